"""State of a sweep, independent of Ray: which trial runs next, how trials ended, which is the best."""

from __future__ import annotations

import time
from pathlib import Path

from metagmvae.configs.load import SettingsError, to_toml
from metagmvae.configs.schema import Settings, TrackingSettings
from metagmvae.configs.search_space import with_values
from metagmvae.evaluation.comparison.formatting import percent
from metagmvae.evaluation.sweeps.ranking import best_trial
from metagmvae.evaluation.sweeps.trials import Status, Trial
from metagmvae.infra.runs.checks import check_encoder_settings
from metagmvae.infra.runs.run_folder import CHECKPOINT
from metagmvae.infra.tune.search import Values, search_method, values_key
from metagmvae.infra.tune.sweep_folder import REASON, SweepFolder, SweepPlan
from metagmvae.pipelines.files import atomic_file
from metagmvae.pipelines.shards.dataset import Dataset

MAX_REJECTED = 1000
"""Number of impossible or repeated proposals in a row after which the space counts as exhausted."""
OUT_OF_TIME = "the hours of the sweep were up"
"""Reason of a trial that the time limit stopped. Tables contain this text, and a resume looks for it."""
BEST = "best.toml"


class SweepState:
    """Proposes trials and records how they ended.

    Only one thread may call the methods. Another thread may read `running` and `ended`.
    """

    def __init__(
        self,
        plan: SweepPlan,
        folder: SweepFolder,
        dataset: Dataset,
        max_trials: int | None,
        hours: float | None = None,
        keep_all: bool = False,
    ) -> None:
        """Restore the state from the folder.

        Args:
            plan: of the sweep.
            folder: created, and locked by this process.
            dataset: on which the trials train.
            max_trials: number of trials to run, over all resumes; refused ones do not count. None: no limit.
            hours: time limit, after which no trial starts and running ones are stopped; None: no limit.
            keep_all: keep the checkpoints of all trials instead of the best one only.
        """
        self.plan, self.folder, self.dataset, self.max_trials = plan, folder, dataset, max_trials
        self.keep_all = keep_all
        self.deadline = time.monotonic() + 3600 * hours if hours is not None else float("inf")
        self.ended: dict[int, Trial] = {}
        self._timed_out_before: dict[int, Trial] = {}
        """Trials that an earlier time limit stopped and that have not ended again, with their results so far."""
        self.running: dict[int, float] = {}
        """Start of each running trial, in seconds of `time.monotonic`, by number."""
        self.timed_out: set[int] = set()
        """Running trials that the time limit stops."""
        self._earlier_seconds: dict[int, float] = {}
        """Wall time of unfinished trials before they were interrupted, by number."""
        self._restore()
        self.started = sum(trial.status != "refused" for trial in self.ended.values()) + len(self.unfinished)
        """Number of trials that count against `max_trials`."""
        self._best = best_trial(self.ended.values())
        interrupted = {number: plan.space.values_of(folder.trial_settings(number)) for number in self.unfinished}
        self._proposed = {values_key(dict(trial.settings)) for trial in self.ended.values()}
        self._proposed |= {values_key(values) for values in interrupted.values()}
        self.search = search_method(plan.search, plan.space, plan.seed, interrupted, self.ended.values())
        self.next_number = max([*self.ended, *self.unfinished], default=-1) + 1

    def _restore(self) -> None:
        """Read ended trials from the table, and the others from their folders."""
        self.folder.repair()
        for trial in self.folder.trials():
            # A trial that the time limit stopped continues now, and gets another line when it ends.
            (self._timed_out_before if trial.reason == OUT_OF_TIME else self.ended)[trial.number] = trial
        self.unfinished = self.folder.unfinished(self.ended)
        for number in list(self.unfinished):
            self._earlier_seconds[number] = self.folder.training_progress(number)[1]
            status, reason = self._status(number, 0)
            if status != "stopped":
                # The trial ended, but the sweep was killed before its line was written.
                self.unfinished.remove(number)
                self.ended[number] = self._make_trial(number, status, reason, self._earlier_seconds[number])
                self.folder.append_trial(self.ended[number])
                self._timed_out_before.pop(number, None)

    def next_trial(self) -> int | None:
        """Prepare the folder of the next trial and return its number, or None if no further trial may start.

        Raises:
            SettingsError: no combination in the space is possible.
        """
        if self.is_out_of_time():
            return None
        if self.unfinished:
            number = self.unfinished.pop(0)
        elif self.max_trials is not None and self.started >= self.max_trials:
            return None
        else:
            proposed = self._propose()
            if proposed is None:
                return None
            number = proposed
            self.started += 1
        self.running[number] = time.monotonic()
        return number

    def requeue_running(self) -> None:
        """Mark running trials as unfinished, so that `next_trial` returns them again."""
        for number, start in self.running.items():
            self._earlier_seconds[number] = self._earlier_seconds.get(number, 0.0) + time.monotonic() - start
        self.unfinished = sorted([*self.unfinished, *self.running])
        self.running.clear()

    def trials(self) -> list[Trial]:
        """All trials with results: ended ones, and ones that an earlier time limit stopped."""
        return [*self._timed_out_before.values(), *self.ended.values()]

    def is_out_of_time(self) -> bool:
        """Whether the time limit has been reached."""
        return time.monotonic() >= self.deadline

    def _propose(self) -> int | None:
        """Ask for proposals until one is possible and new; return its number, or None if the space is exhausted."""
        for _ in range(MAX_REJECTED):
            number = self.next_number
            values = self.search.ask(number)
            if values is None:
                return None
            self.next_number += 1
            if values_key(values) in self._proposed:
                self.search.discard(number)  # the same training would give the same result
                continue
            try:
                settings = self.make_settings(number, values)
            except SettingsError as error:
                self._refuse(number, values, str(error))
                continue
            values = self.plan.space.values_of(settings)
            if values_key(values) in self._proposed:  # 5 in the space becomes 5.0 in a setting that is a float
                self.search.discard(number)
                continue
            self._proposed.add(values_key(values))
            self.folder.create_trial(number, settings)
            self.search.accept(number, values)
            return number
        if not self.started:
            last = next(reversed(self.ended.values())).reason
            raise SettingsError(
                f"none of {MAX_REJECTED} proposals is possible; the last one: {last}; change the search space"
            )
        return None

    def make_settings(self, number: int, values: Values) -> Settings:
        """Settings of a trial.

        Raises:
            SettingsError: the combination of values is impossible.
        """
        settings = with_values(self.plan.base, values)
        check_validation_interval(settings)
        check_encoder_settings(settings, self.dataset, "learner")
        run = settings.run.model_copy(update={"out": str(self.folder.trial_folder(number)), "figures": False})
        name = f"{self.plan.name}-{number:05d}"
        return settings.model_copy(update={"name": name, "run": run, "tracking": TrackingSettings(enabled=False)})

    def _refuse(self, number: int, values: Values, reason: str) -> None:
        self._proposed.add(values_key(values))
        self._record(Trial(number=number, settings=values, status="refused", reason=reason))

    def end_trial(self, number: int, failures: int = 0, cause: str = "") -> Trial:
        """Record the end of a running trial. Its line is on disk when this returns.

        Args:
            number: of the trial.
            failures: number of times that its process was lost, if that ended it.
            cause: last error message of the lost process, if known.
        """
        seconds = time.monotonic() - self.running.pop(number) + self._earlier_seconds.pop(number, 0.0)
        status, reason = self._status(number, failures)
        if reason and failures and cause:
            reason = f"{reason}: {cause}"
        trial = self._make_trial(number, status, reason, seconds)
        self._record(trial)
        self._delete_checkpoints(trial)
        return trial

    def _status(self, number: int, failures: int) -> tuple[Status, str]:
        """Status and reason of a trial, from the files in its folder; `stopped` if these do not show another end."""
        reason = self.folder.trial_folder(number) / REASON
        if reason.exists():
            return "failed", reason.read_text(encoding="utf-8").strip()
        if self.folder.training_progress(number)[0] == self.folder.trial_settings(number).train.steps:
            return "finished", ""
        if failures:
            return "failed", f"its process was lost {failures} time{'s' if failures > 1 else ''}"
        return "stopped", OUT_OF_TIME if number in self.timed_out else ""

    def _make_trial(self, number: int, status: Status, reason: str, seconds: float) -> Trial:
        return Trial(
            number=number,
            settings=self.plan.space.values_of(self.folder.trial_settings(number)),
            status=status,
            reason=reason,
            curve=self.folder.curve(number, self.plan.task),
            seconds=seconds,
        )

    def _record(self, trial: Trial) -> None:
        """Write the line of a trial first, because a resume restores everything else from it."""
        self.folder.append_trial(trial)
        self.ended[trial.number] = trial
        self._timed_out_before.pop(trial.number, None)
        self.search.tell(trial)

    def _delete_checkpoints(self, trial: Trial) -> None:
        """Keep only the checkpoints of the best trial and of trials that a resume continues, to save disk space."""
        # The earlier trial comes first: of equal trials it is the best, as in `write_best`.
        previous, self._best = self._best, best_trial([*([self._best] if self._best else []), trial])
        for old in (trial, previous):
            if old is not None and old is not self._best and old.reason != OUT_OF_TIME and not self.keep_all:
                (self.folder.trial_folder(old.number) / CHECKPOINT).unlink(missing_ok=True)

    def write_best(self) -> Trial | None:
        """Write the best settings as a TOML file for `metagmvae train`; None if no trial has an accuracy."""
        best = best_trial(self.trials())
        if best is None or best.last is None:
            return None
        base = self.plan.base
        settings = with_values(base, best.settings)
        out = str(Path(base.run.out).with_name(f"{self.plan.name}-best"))
        run = settings.run.model_copy(update={"out": out})
        settings = settings.model_copy(update={"name": f"{self.plan.name}-best", "run": run})
        score = f"{percent(best.last.accuracy, best.last.ci95)}% ({self.plan.task}, validation)"
        head = f"# Trial {best.number} of the sweep {self.plan.name}: {score} after {best.last.step} steps.\n"
        head += f"# Command: metagmvae train {self.folder.root / BEST}\n"
        with atomic_file(self.folder.root / BEST) as file:
            file.write((head + to_toml(settings)).encode())
        return best


def check_validation_interval(settings: Settings) -> None:
    """Refuse settings with which the last training step would not be validated.

    Raises:
        SettingsError: train.steps is not a multiple of validation.every.
    """
    steps, every = settings.train.steps, settings.validation.every
    if not every or not steps or steps % every:
        raise SettingsError(
            f"train.steps ({steps}) is not a multiple of validation.every ({every}), so the final model would not be "
            f"validated: set validation.every to {_suggested_interval(steps)}, or change --steps"
        )


def _suggested_interval(steps: int) -> int:
    """The largest divisor of `steps` with which there are at least four validations."""
    return max((every for every in range(1, steps // 4 + 1) if steps % every == 0), default=1)
