"""A Ray worker trains on the data of its driver only."""

import pytest
from command_words import TINY, set_words

from metagmvae.configs.load import load_settings, to_json
from metagmvae.infra.cluster import train_worker
from metagmvae.pipelines.records import DataError

pytestmark = pytest.mark.ray


def test_a_node_with_another_copy_of_the_data_trains_nothing(dataset, monkeypatch):
    started = []
    monkeypatch.setattr(train_worker, "RayContext", lambda checkpoint, stop_flag: None)
    monkeypatch.setattr(train_worker, "train_in_process", lambda inputs, context, kind: started.append(inputs.dataset))
    words = [word.removeprefix("--set=") for word in set_words(TINY)]
    settings = load_settings("omniglot-5way", [word for word in words if word != "--set"])
    config = {"settings": to_json(settings), "data": dataset.uri, "kind": "learner", "checkpoint": None}
    config |= {"stop_flag": None, "fingerprint": dataset.fingerprint}
    train_worker.train_worker(config)
    assert [data.uri for data in started] == [dataset.uri]
    with pytest.raises(DataError, match="is another dataset"):
        train_worker.train_worker(config | {"fingerprint": "0" * 64})
    assert len(started) == 1
