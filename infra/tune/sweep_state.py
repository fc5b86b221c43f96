"""The course of a sweep, without Ray: what is tried next, what became of it, what was best."""

from __future__ import annotations

import time
from pathlib import Path

from metagmvae.configs.load import SettingsError, to_toml
from metagmvae.configs.schema import Settings, TrackingSettings
from metagmvae.configs.search_space import with_values
from metagmvae.evaluation.sweeps.ranking import best_trial
from metagmvae.evaluation.sweeps.trials import Status, Trial
from metagmvae.infra.runs.checks import check_encoder_settings
from metagmvae.infra.runs.run_folder import CHECKPOINT
from metagmvae.infra.tune.search import Values, key_of, search_method
from metagmvae.infra.tune.sweep_folder import REASON, SweepFolder, SweepPlan
from metagmvae.pipelines.files import atomic_file
from metagmvae.pipelines.shards.dataset import Dataset

REDRAWS = 1000
"""Impossible or repeated proposals in a row after which the space counts as used up."""
OUT_OF_TIME = "the hours of the sweep were up"
BEST = "best.toml"


class SweepState:
    """Hands out trials and takes down how they ended. One thread drives it; another may read `running`, `ended`."""

    def __init__(
        self,
        plan: SweepPlan,
        folder: SweepFolder,
        dataset: Dataset,
        trials: int | None,
        hours: float | None = None,
        keep_all: bool = False,
    ) -> None:
        """Go on from what the folder holds.

        Args:
            plan: of the sweep.
            folder: made, and held by this process.
            dataset: that trials train on.
            trials: that take a slot, over all resumes; None: as many as a grid has.
            hours: after which none is begun and those that run are stopped; None: no limit.
            keep_all: keep the checkpoint of every trial, not of the best one only.
        """
        self.plan, self.folder, self.dataset, self.budget = plan, folder, dataset, trials
        self.keep_all = keep_all
        self.until = time.monotonic() + 3600 * hours if hours is not None else float("inf")
        self.ended: dict[int, Trial] = {}
        self._cut_off: dict[int, Trial] = {}
        """What the hours of before cut off, as far as it came; until it ends anew."""
        self.running: dict[int, float] = {}
        """Number -> when it began, in the seconds of `time.monotonic`."""
        self.late: set[int] = set()
        """Trials that the hours cut off."""
        self._before: dict[int, float] = {}
        self._restore()
        self.taken = sum(trial.status != "refused" for trial in self.ended.values()) + len(self.waiting)
        """Trials that have or had a slot."""
        self._best = best_trial(self.ended.values())
        chosen = {number: plan.space.values_of(folder.settings(number)) for number in self.waiting}
        self._seen = {key_of(dict(trial.settings)) for trial in self.ended.values()} | set(map(key_of, chosen.values()))
        self.proposer = search_method(plan.search, plan.space, plan.seed, chosen, self.ended.values())
        self.next_number = max([*self.ended, *self.waiting], default=-1) + 1

    def _restore(self) -> None:
        """Ended trials from the table; the others from their folders, to go on with."""
        self.folder.mend()
        for trial in self.folder.trials():
            # What the hours cut off goes on where there are hours again, and gets another line when it ends.
            (self._cut_off if trial.reason == OUT_OF_TIME else self.ended)[trial.number] = trial
        self.waiting = self.folder.unfinished(self.ended)
        for number in list(self.waiting):
            self._before[number] = self.folder.trained(number)[1]
            if self._status(number, 0)[0] != "stopped":
                # It ended in the moment that the sweep was killed in, and was not taken down any more.
                self.waiting.remove(number)
                self.ended[number] = self._made(number, *self._status(number, 0), self._before[number])
                self.folder.record(self.ended[number])
                self._cut_off.pop(number, None)

    def next(self) -> int | None:
        """The number of the next trial, its folder ready; None: there is no more to begin.

        Raises:
            SettingsError: nothing in the space is possible.
        """
        if self.is_late():
            return None
        if self.waiting:
            number = self.waiting.pop(0)
        elif self.budget is not None and self.taken >= self.budget:
            return None
        else:
            found = self._draw()
            if found is None:
                return None
            number = found
            self.taken += 1
        self.running[number] = time.monotonic()
        return number

    def take_back(self) -> None:
        """Trials that were handed out and dropped: to go on with."""
        for number, began in self.running.items():
            self._before[number] = self._before.get(number, 0.0) + time.monotonic() - began
        self.waiting = sorted([*self.waiting, *self.running])
        self.running.clear()

    def trials(self) -> list[Trial]:
        """All that have ended; what was cut off and had no hours to go on again too, as far as it came."""
        return [*self._cut_off.values(), *self.ended.values()]

    def is_late(self) -> bool:
        """Whether the hours are up."""
        return time.monotonic() >= self.until

    def _draw(self) -> int | None:
        """Propose until something is possible and new."""
        for _ in range(REDRAWS):
            number = self.next_number
            values = self.proposer.draw(number)
            if values is None:
                return None
            self.next_number += 1
            if key_of(values) in self._seen:
                self.proposer.forget(number)  # the same training again would end alike
                continue
            try:
                settings = self.trial_settings(number, values)
            except SettingsError as error:
                self._refuse(number, values, str(error))
                continue
            values = self.plan.space.values_of(settings)
            if key_of(values) in self._seen:  # 5 in the space is 5.0 where the setting is a real number
                self.proposer.forget(number)
                continue
            self._seen.add(key_of(values))
            self.folder.open_trial(number, settings)
            self.proposer.take(number, values)
            return number
        if not self.taken:
            last = next(reversed(self.ended.values())).reason
            raise SettingsError(f"{REDRAWS} proposals and none is possible; the last one: {last}; change the space")
        return None

    def trial_settings(self, number: int, values: Values) -> Settings:
        """Settings of a trial.

        Raises:
            SettingsError: the combination is impossible.
        """
        settings = with_values(self.plan.base, values)
        check_validated(settings)
        check_encoder_settings(settings, self.dataset, "meta-gmvae")
        here = {"out": str(self.folder.folder(number)), "figures": False}
        free = {"run": settings.run.model_copy(update=here), "tracking": TrackingSettings(enabled=False)}
        return settings.model_copy(update={"name": f"{self.plan.name}-{number:05d}", **free})

    def _refuse(self, number: int, values: Values, reason: str) -> None:
        self._seen.add(key_of(values))
        self._end(Trial(number=number, settings=values, status="refused", reason=reason))

    def has_ended(self, number: int, died: int = 0, why: str = "") -> Trial:
        """Take down how a trial ended; its table line is on disk when this returns.

        Args:
            number: of the trial.
            died: times that its process was lost, where that ended it.
            why: it was lost, as far as is known.
        """
        seconds = time.monotonic() - self.running.pop(number) + self._before.pop(number, 0.0)
        status, reason = self._status(number, died)
        trial = self._made(number, status, reason + (f": {why}" if reason and died and why else ""), seconds)
        self._end(trial)
        self._keep_checkpoint(trial)
        return trial

    def _status(self, number: int, died: int) -> tuple[Status, str]:
        """How a trial ended, by what is in its folder; `stopped` where nothing else says so."""
        reason = self.folder.folder(number) / REASON
        if reason.exists():
            return "failed", reason.read_text(encoding="utf-8").strip()
        if self.folder.trained(number)[0] == self.folder.settings(number).train.steps:
            return "finished", ""
        if died:
            return "failed", f"its process was lost {died} time{'s' if died > 1 else ''}"
        return "stopped", OUT_OF_TIME if number in self.late else ""

    def _made(self, number: int, status: Status, reason: str, seconds: float) -> Trial:
        return Trial(
            number=number,
            settings=self.plan.space.values_of(self.folder.settings(number)),
            status=status,
            reason=reason,
            curve=self.folder.curve(number, self.plan.task),
            seconds=seconds,
        )

    def _end(self, trial: Trial) -> None:
        """The line first: all else is found again from it."""
        self.folder.record(trial)
        self.ended[trial.number] = trial
        self._cut_off.pop(trial.number, None)
        self.proposer.tell(trial)

    def _keep_checkpoint(self, trial: Trial) -> None:
        """Only the best trial keeps its checkpoint, and one that is to go on; a thousand of them fill a disk."""
        # The earlier one first: of equals it is the best, as in `write_best`.
        before, self._best = self._best, best_trial([*([self._best] if self._best else []), trial])
        for old in (trial, before):
            if old is not None and old is not self._best and old.reason != OUT_OF_TIME and not self.keep_all:
                (self.folder.folder(old.number) / CHECKPOINT).unlink(missing_ok=True)

    def write_best(self) -> Trial | None:
        """Write the best settings as a TOML file that `metagmvae train` takes; None where no trial was judged."""
        best = best_trial(self.trials())
        if best is None or best.last is None:
            return None
        base = self.plan.base
        settings = with_values(base, best.settings)
        out = str(Path(base.run.out).with_name(f"{self.plan.name}-best"))
        run = settings.run.model_copy(update={"out": out})
        settings = settings.model_copy(update={"name": f"{self.plan.name}-best", "run": run})
        score = f"{100 * best.last.accuracy:.2f} ± {100 * best.last.ci95:.2f}% ({self.plan.task}, validation)"
        head = f"# Trial {best.number} of the sweep {self.plan.name}: {score} after {best.last.step} steps.\n"
        head += f"# Command: metagmvae train {self.folder.root / BEST}\n"
        with atomic_file(self.folder.root / BEST) as file:
            file.write((head + to_toml(settings)).encode())
        return best


def check_validated(settings: Settings) -> None:
    """Refuse a trial whose last step would not be judged.

    Raises:
        SettingsError: naming steps and interval.
    """
    steps, every = settings.train.steps, settings.validation.every
    if not every or not steps or steps % every:
        raise SettingsError(
            f"train.steps ({steps}) is not a multiple of validation.every ({every}), and what was trained would not "
            f"be judged: set validation.every to {_divisor(steps)}, or --steps"
        )


def _divisor(steps: int) -> int:
    """Of the divisors of so many steps, the one that judges four times or little more often."""
    return max((every for every in range(1, steps // 4 + 1) if steps % every == 0), default=1)
