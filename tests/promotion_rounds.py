"""Promotes in rounds, at the same time as other processes: `promotion_rounds.py URI NAME DATA FOLDER ROUNDS INDEX`.

In each round it waits for the file that the test writes for all processes, and then promotes the INDEX-th version that
is not champion over the champion. It prints the answer as a line of JSON.
"""

import json
import sys
import time
from pathlib import Path

from metagmvae.evaluation.comparison.head_to_head import open_plan
from metagmvae.infra.commands.parsing import format_answer
from metagmvae.infra.registry.alias_history import alias_version
from metagmvae.infra.registry.promote import PromotionRequest, promote
from metagmvae.infra.tracking.store import connect


def main(uri: str, name: str, data: str, folder: str, rounds: str, index: str) -> None:
    from metagmvae.configs.schema import TrackingSettings

    task = {"way": 5, "shot": 1, "query": 3, "episodes": 30, "seed": 0}
    plan = open_plan(data, "validation", [task], other_data=True)
    store = connect(TrackingSettings(uri=uri))
    for number in range(int(rounds)):
        champion = alias_version(store, name, "champion")
        versions = sorted(str(v.version) for v in store.client.search_model_versions(f"name = '{name}'"))
        mine = [version for version in versions if version != champion][int(index)]
        (Path(folder) / f"ready-{number}-{index}").touch()
        while not (Path(folder) / f"go-{number}").exists():
            time.sleep(0.001)
        # With this margin any difference is good enough: each process would win alone.
        request = PromotionRequest(f"models:/{name}/{mine}", allow_equal=True, margin=0.999)
        answer = promote(request, plan)
        assert format_answer(answer)
        print(json.dumps({"round": number, "before": champion, "mine": mine, **answer}), flush=True)
        (Path(folder) / f"done-{number}-{index}").touch()


if __name__ == "__main__":
    main(*sys.argv[1:])
