"""The LLM's engine on Ray Serve, as its settings describe it; nothing is started here."""

from typing import Any

import pytest
from pydantic import ValidationError
from ray.serve.llm import LLMConfig
from ray.serve.llm.request_router import PrefixCacheAffinityRouter

from workers.serve import llm_config
from workers.serve_settings import ServeSettings


def engine(**settings: Any) -> LLMConfig:
    return llm_config(ServeSettings(vllm_device="gpu", vllm_model="a/model", **settings))


def test_one_copy_of_the_model_is_the_default_and_needs_no_router() -> None:
    deployment = engine().deployment_config

    assert (
        deployment["autoscaling_config"].items() >= {"min_replicas": 1, "max_replicas": 1}.items()
    )
    assert "request_router_config" not in deployment


def test_more_copies_grow_with_the_load_and_keep_a_councils_prefix_together() -> None:
    deployment = engine(
        vllm_min_replicas=2, vllm_max_replicas=4, vllm_max_num_seqs=16
    ).deployment_config

    assert deployment["autoscaling_config"] == {
        "min_replicas": 2,
        "max_replicas": 4,
        "target_ongoing_requests": 16,
    }
    assert deployment["max_ongoing_requests"] > 16
    router = deployment["request_router_config"]
    assert router["request_router_class"].rpartition(".")[2] == PrefixCacheAffinityRouter.__name__
    assert router["request_router_kwargs"]["imbalanced_threshold"] == 16


def test_a_copy_may_take_several_gpus() -> None:
    assert engine(vllm_tensor_parallel_size=4).engine_kwargs["tensor_parallel_size"] == 4


def test_fewer_at_most_than_at_least_is_refused() -> None:
    with pytest.raises(ValidationError, match="VLLM_MIN_REPLICAS must be at most"):
        engine(vllm_min_replicas=3, vllm_max_replicas=2)


def test_arguments_of_a_ray_service_come_on_top_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_MODEL", "from/environment")
    monkeypatch.setenv("VLLM_MAX_REPLICAS", "2")

    settings = ServeSettings.model_validate({"vllm_max_replicas": "3"})

    assert (settings.vllm_model, settings.vllm_max_replicas) == ("from/environment", 3)
