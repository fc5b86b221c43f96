"""The folder of a sweep: when it can be used or resumed, and its lock."""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
from small_sweep import open_sweep

from metagmvae.configs.load import SettingsError, load_settings
from metagmvae.configs.search_space import load_space
from metagmvae.infra.runs.folder_lock import lock_run_folder
from metagmvae.infra.runs.run_folder import TRAINING_LOCK
from metagmvae.infra.tune import ray_backend
from metagmvae.infra.tune.request import SweepRequest, run
from metagmvae.infra.tune.sweep_folder import SweepFolder, SweepPlan
from metagmvae.pipelines.records import DataError


def test_a_folder_without_trials_can_be_used_again(plan, dataset, tmp_path):
    sweep = open_sweep(plan, dataset, tmp_path / "sweep")
    with lock_run_folder(tmp_path / "sweep"):
        sweep.folder.clear()
        sweep.folder.check(resume=False)
        sweep.folder.create()
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == [TRAINING_LOCK, "trials"]


def test_if_the_cluster_does_not_start_the_folder_can_be_used_again(plan, dataset, tmp_path, monkeypatch):
    @contextmanager
    def broken(*request, **options):
        raise RuntimeError("no cluster")
        yield

    monkeypatch.setattr("metagmvae.infra.tune.ray_backend.sweep_cluster", broken)
    request = SweepRequest(base=plan.base, space=plan.space, out=tmp_path / "sweep")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no cluster"):
            run(request)
    assert not (tmp_path / "sweep").exists()


@contextmanager
def cluster_of(*request, **options):
    yield


def test_a_dry_run_and_refused_requests_leave_nothing(plan, dataset, tmp_path, monkeypatch):
    def started(*arguments):
        raise AssertionError("Ray was started")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("metagmvae.infra.cluster.connect._start", started)
    request = SweepRequest(base=plan.base, space=plan.space, out=tmp_path / "sweep", dry_run=True)
    answer = run(request)
    assert answer["trials"] == 20
    assert answer["varied"] == list(plan.space.to_dict())
    wrong = plan.base.model_copy(update={"model": plan.base.model.model_copy(update={"encoder": "resnet99"})})
    with pytest.raises(ValueError, match="resnet99"):
        run(replace(request, base=wrong, dry_run=False))
    without = plan.base.model_copy(update={"data": plan.base.data.model_copy(update={"validation_split": "val"})})
    with pytest.raises(ValueError, match="has no split 'val', by which a sweep ranks its trials"):
        run(replace(request, base=without, dry_run=False))
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_stopped_by_a_signal_says_what_continues_it(plan, dataset, tmp_path, monkeypatch):
    def stop_before(*arguments):
        raise KeyboardInterrupt

    def stop_after_one(sweep, *arguments):
        sweep.next_trial()
        raise KeyboardInterrupt

    monkeypatch.setattr("metagmvae.infra.tune.ray_backend.sweep_cluster", cluster_of)
    base = plan.base.model_copy(update={"tracking": plan.base.tracking.model_copy(update={"enabled": False})})
    request = SweepRequest(base=base, space=plan.space, out=tmp_path / "sweep")
    monkeypatch.setattr("metagmvae.infra.tune.ray_backend.run_sweep", stop_before)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(request)
    assert stopped.value.__notes__ == ["no trial had started; run the command again"]
    monkeypatch.setattr("metagmvae.infra.tune.ray_backend.run_sweep", stop_after_one)
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt) as stopped:
            run(replace(request, resume=resume))
        note = "trials that have ended: 0; interrupted: 1; the same command with --resume continues"
        assert stopped.value.__notes__ == [note]


@pytest.mark.parametrize(("device", "gpus", "refused"), [("cuda", 0, True), ("cuda", 1, False), ("auto", 0, False)])
def test_gpus_are_those_of_the_cluster(plan, monkeypatch, device, gpus, refused):
    monkeypatch.setattr(ray_backend, "cluster", cluster_of)
    monkeypatch.setattr(ray_backend, "gpu_count", lambda: gpus)
    base = plan.base.model_copy(update={"run": plan.base.run.model_copy(update={"device": device})})
    if refused:
        with pytest.raises(ValueError, match="the Ray cluster has no GPU"), ray_backend.sweep_cluster(base, 1):
            pass
    else:
        with ray_backend.sweep_cluster(base, 1):
            pass


def test_a_changed_sweep_cannot_be_resumed_and_the_differences_are_named(plan, dataset, tmp_path):
    root = tmp_path / "sweep"
    open_sweep(plan, dataset, root)
    with pytest.raises(DataError, match="not empty; continue its sweep with --resume"):
        open_sweep(plan, dataset, root)
    base = load_settings("omniglot-5way", ["train.steps=30", "validation.every=10", f"data.uri={dataset.uri}"])
    other = SweepPlan("mine", base, plan.space, "tpe", "none", 1, "5w5s")
    with pytest.raises(SettingsError) as error:
        open_sweep(other, dataset, root, resume=True)
    for part in ("search: 'tpe', 'random'", "seed: 1, 0", "task: '5w5s', '5w1s'", "train.steps: 30, 20"):
        assert part in str(error.value)
    (tmp_path / "space.toml").write_text("train.components = {range=[2, 5]}")
    wider = SweepPlan("mine", plan.base, load_space(tmp_path / "space.toml"), "random", "none", 0, "5w1s")
    with pytest.raises(SettingsError, match=r'space train\.components: .*"high": 5.*, .*"high": 9'):
        open_sweep(wider, dataset, root, resume=True)
    open_sweep(SweepPlan("mine", plan.base, plan.space, "random", "none", 0, "5w1s"), dataset, root, resume=True)


@pytest.mark.parametrize("content", ["{}", "[]", '{"task": 1, "search": 1, "scheduler": 1, "seed": 0, "space": []}'])
def test_an_unreadable_plan_is_an_error(plan, dataset, tmp_path, content):
    open_sweep(plan, dataset, tmp_path / "sweep")
    (tmp_path / "sweep" / "sweep.json").write_text(content)
    with pytest.raises(DataError, match=r"sweep\.json: not a plan that this version can read .*--out DIR"):
        open_sweep(plan, dataset, tmp_path / "sweep", resume=True)


@pytest.mark.parametrize("what", ["code", "torch", "data"])
def test_changed_code_or_data_prevents_a_resume(plan, dataset, tmp_path, what):
    root = tmp_path / "sweep"
    open_sweep(plan, dataset, root)
    kept = json.loads((root / "sweep.json").read_text())
    if what == "data":
        kept["data_fingerprint"] = "0" * 64
    else:
        kept["code"]["torch" if what == "torch" else "training/objectives/elbo.py"] = "1.0"
    (root / "sweep.json").write_text(json.dumps(kept))
    reasons = {
        "code": r"code: training/objectives/elbo\.py",
        "torch": r"code: torch: .*, 1\.0",
        "data": "differs in content from",
    }
    with pytest.raises(SettingsError, match=reasons[what]):
        open_sweep(plan, dataset, root, resume=True)


def test_a_folder_with_other_files_is_refused(plan, dataset, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for resume in (False, True):
        with pytest.raises(DataError, match="mine: not"):
            open_sweep(plan, dataset, tmp_path / "mine", resume=resume)
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "sweep"):
        for resume in (False, True):
            with pytest.raises(DataError, match=rf"--out {out}: cannot be written, because .*/file is no writable"):
                SweepFolder(out).check(resume)


def test_a_folder_in_use_and_a_changed_plan_are_named_before_ray_starts(plan, dataset, tmp_path, monkeypatch):
    """The start of Ray takes seconds."""

    def started(*arguments, **options):
        raise AssertionError("Ray was started")

    monkeypatch.setattr("metagmvae.infra.tune.ray_backend.sweep_cluster", started)
    base = plan.base.model_copy(update={"tracking": plan.base.tracking.model_copy(update={"enabled": False})})
    root = tmp_path / "sweep"
    open_sweep(replace(plan, name="sweep", base=base, scheduler="asha"), dataset, root)
    request = SweepRequest(base=base, space=plan.space, out=root, resume=True)
    with pytest.raises(AssertionError, match="Ray was started"):  # nothing is wrong with it
        run(request)
    with lock_run_folder(root), pytest.raises(DataError, match=r"another process trains in this folder.*--out DIR"):
        run(request)
    with pytest.raises(SettingsError, match="cannot resume, the sweep has changed \\(seed: 1, 0\\)"):
        run(replace(request, seed=1))
