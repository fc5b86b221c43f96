"""Promotes in rounds, at the same time as other processes: `promotion_rounds.py URI NAME DATA FOLDER ROUNDS INDEX`.

In each round it promotes the INDEX-th version that is not champion over the champion. When it knows the champion and is
about to evaluate, it waits for the file that the test writes for all processes: a slow process would otherwise compare
with the version that a fast one has promoted. It prints the answer as a line of JSON.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import metagmvae.infra.registry.promote as promote_module
from metagmvae.evaluation.comparison.head_to_head import HeadToHead, evaluate_head_to_head, open_plan
from metagmvae.infra.commands.parsing import format_answer
from metagmvae.infra.registry.alias_history import alias_version
from metagmvae.infra.registry.promote import PromotionRequest, promote
from metagmvae.infra.tracking.store import connect


def evaluate_together(folder: Path, number: int, index: str, *arguments: Any) -> HeadToHead:
    (folder / f"ready-{number}-{index}").touch()
    while not (folder / f"go-{number}").exists():
        time.sleep(0.001)
    return evaluate_head_to_head(*arguments)


def main(uri: str, name: str, data: str, folder: str, rounds: str, index: str) -> None:
    from metagmvae.configs.schema import TrackingSettings

    task = {"way": 5, "shot": 1, "query": 3, "episodes": 30, "seed": 0}
    plan = open_plan(data, "validation", [task], other_data=True)
    store = connect(TrackingSettings(uri=uri))
    for number in range(int(rounds)):
        champion = alias_version(store, name, "champion")
        versions = sorted(str(v.version) for v in store.client.search_model_versions(f"name = '{name}'"))
        mine = [version for version in versions if version != champion][int(index)]
        promote_module.evaluate_head_to_head = partial(evaluate_together, Path(folder), number, index)
        # With this margin any difference is good enough: each process would win alone.
        request = PromotionRequest(f"models:/{name}/{mine}", allow_equal=True, margin=0.999)
        answer = promote(request, plan)
        assert format_answer(answer)
        print(json.dumps({"round": number, "before": champion, "mine": mine, **answer}), flush=True)
        (Path(folder) / f"done-{number}-{index}").touch()


if __name__ == "__main__":
    main(*sys.argv[1:])
