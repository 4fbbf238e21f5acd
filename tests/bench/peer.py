"""The loop of mini-swe-agent against a scripted endpoint, timed: `python peer.py URL TREE`.

It runs in the environment of the extra `bench-peer`, which tests/bench/environments.py makes. It
prints the seconds of a second run, so that the first calls of its libraries do not count.
"""

import json
import shutil
import sys
import time

from minisweagent.agents.default import DefaultAgent
from minisweagent.environments.extra.bubblewrap import BubblewrapEnvironment
from minisweagent.models.litellm_model import LitellmModel


def ran(url: str, tree: str) -> float:
    environment = BubblewrapEnvironment()
    shutil.copytree(tree, environment.working_dir, dirs_exist_ok=True)
    model = LitellmModel(
        model_name="openai/test-model",
        model_kwargs={"api_base": url, "api_key": "none"},
        cost_tracking="ignore_errors",
    )
    agent = DefaultAgent(model, environment, system_template="Work.", instance_template="{{task}}")
    began = time.perf_counter()
    ended = agent.run("Let it add.")
    seconds = time.perf_counter() - began
    assert ended["exit_status"] == "Submitted", ended
    return seconds


def main() -> None:
    url, tree = sys.argv[1:]
    ran(url, tree)
    print(json.dumps({"seconds": ran(url, tree)}))


main()
