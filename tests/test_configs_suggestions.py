"""A wrong word gets the word that means the same thing, not the one that looks alike."""

import pytest

from metagmvae.configs.load import presets, setting_keys
from metagmvae.configs.suggestions import SAME_MEANING, SECTIONS, setting_suggestion, similar

COMMANDS = ("prepare", "features", "train", "pretrain", "tune", "evaluate", "classify", "models", "promote", "doctor")


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("train.lr", ["train.learning_rate"]),
        ("pretrain.lr", ["pretrain.learning_rate"]),
        ("lr", ["pretrain.learning_rate", "train.learning_rate"]),
        ("optimizer.lr", ["train.learning_rate"]),
        ("train.epochs", ["train.steps"]),
        ("train.num_steps", ["train.steps"]),
        ("train.batch_size", ["train.batch"]),
        ("batch_size", ["pretrain.batch", "train.batch"]),
        ("train.wd", ["train.weight_decay"]),
        ("train.optimizer", ["pretrain.optimizer"]),
        ("train.way", ["method.way", "validation.way"]),
        ("model.n_way", ["method.way", "validation.way"]),
        ("validation.k_shot", ["validation.shots"]),
        ("eval.shots", ["validation.shots"]),
        ("data.num_workers", ["run.workers"]),
        ("gpus", ["run.workers"]),
        ("run.gpu", ["run.device"]),
        ("train.device", ["run.device"]),
        ("run.seed", ["train.seed", "validation.seed"]),
        ("training.Seed", ["train.seed"]),
        ("data.path", ["data.uri"]),
        ("model.backbone", ["model.encoder"]),
        ("model.latent_dim", ["model.latent"]),
        ("train.fp16", ["train.precision"]),
        ("train.grad_clip", ["train.clip_norm"]),
        ("run.output_dir", ["run.out"]),
        ("mlflow.experiment_name", ["tracking.experiment"]),
        ("train.learning-rate", ["train.learning_rate"]),
        ("train.learnin_rate", ["train.learning_rate"]),
        ("train.temperature", ["adapt.temperature", "pretrain.temperature"]),
        ("model.em_iterations", ["train.em_iterations"]),
    ],
)
def test_settings(wrong, meant):
    assert setting_suggestion(wrong, setting_keys()) == f"; did you mean {' or '.join(map(repr, meant))}?"


def test_without_a_similar_word_the_known_ones_are_listed():
    assert setting_suggestion("run.zzz", setting_keys()).startswith("; known in [run]: out, engine, workers")
    assert setting_suggestion("zzz", setting_keys()).startswith("; known: data, method, model")
    assert setting_suggestion("train", setting_keys()) == "; it is a section: name one of its keys, train.KEY"


@pytest.mark.parametrize(
    ("wrong", "known", "meant"),
    [
        ("eval", COMMANDS, ["evaluate"]),
        ("test", COMMANDS, ["evaluate"]),
        ("predict", COMMANDS, ["classify"]),
        ("fit", COMMANDS, ["train"]),
        ("sweep", COMMANDS, ["tune"]),
        ("trian", COMMANDS, ["train"]),
        ("xyz", COMMANDS, []),
        ("omniglot_cpu", presets(), ["omniglot-cpu"]),
        ("omniglot-cpv", presets(), ["omniglot-cpu"]),
        ("mini-imagenet-20way", presets(), []),
        (
            "omniglot",
            ("omniglot-20way-paper", "omniglot-cpu", "omniglot-5way"),
            ["omniglot-cpu"],
        ),
        (
            "20way",
            ("omniglot-20way-published-code", "omniglot-20way-paper"),
            ["omniglot-20way-paper", "omniglot-20way-published-code"],
        ),
        ("20way-published-code", presets(), ["omniglot-20way-published-code"]),
    ],
)
def test_commands_and_presets(wrong, known, meant):
    assert similar(wrong, known) == meant


def test_tables_name_what_exists():
    names = {key.rpartition(".")[2] for key in setting_keys()}
    commands = {"track", "demo", "bench", "verify", "figure", "table", "compare", "config", *COMMANDS}
    assert set(SAME_MEANING.values()) <= names | commands
    assert set(SECTIONS.values()) == {key.partition(".")[0] for key in setting_keys() if "." in key}
