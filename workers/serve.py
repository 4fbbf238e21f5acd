"""The agents' LLM: vLLM hosted by Ray Serve, with an OpenAI-compatible API.

`python -m workers.serve` runs a Ray head and the app in one foreground process, on loopback; with
RAY_ADDRESS it puts the app on that cluster instead. In Kubernetes a RayService imports
`workers.serve:app`.
"""

import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any, NoReturn

# Nothing is reported to anyone, and prompts, which contain people's stories, stay out of the logs.
# Set before Ray and vLLM are imported, because they read these on import, as do the processes they
# start.
os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "RAYLLM_ENABLE_REQUEST_PROMPT_LOGS": "0",
    "RAYLLM_ENABLE_WORKER_PROCESS_SETUP_HOOK": "0",  # Ray allows one hook; _start_ray sets it
    "RAY_SERVE_LLM_ROUTER_MIN_REPLICAS": "1",
    "RAY_SERVE_LLM_ROUTER_INITIAL_REPLICAS": "1",
}

import ray
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from ray import serve
from ray.llm._internal.common.callbacks.base import CallbackBase, CallbackConfig
from ray.llm._internal.serve.core.ingress import ingress
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.llm import LLMConfig, build_openai_app

from workers.same_site import SameSite, own_hosts
from workers.serve_settings import ServeSettings

APP = "agents"
STOPS_WITHIN_S = 10
LOOPBACK = ("127.0.0.1", "localhost", "::1")
GiB = 1024**3

CPU_MAX_MODEL_LEN = 2048
"""Tokens. Agents size their answers by the context window: a longer one takes only more time."""


class NoDownload(CallbackBase):  # type: ignore[misc]  # Ray ships no types
    """A callback with which Ray skips the download of a model that is already here.

    Without it, Ray would start a process only to find out that there is nothing to fetch.
    """

    async def on_before_node_init(self) -> None:
        """Skip the initialisation of the node; the engine calls this as it starts."""
        self.ctx.run_init_node = False


def llm_config(settings: ServeSettings) -> LLMConfig:
    """Return the engine: prefix cache, JSON without free whitespace, cached tokens reported."""
    engine: dict[str, Any] = {
        "dtype": "bfloat16",
        "max_num_seqs": settings.vllm_max_num_seqs,
        "enable_prefix_caching": True,
        "enable_prompt_tokens_details": True,
        # A small model that may choose its whitespace generates it until it runs out of tokens.
        "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
    }
    if longest := settings.vllm_max_model_len or (None if settings.on_gpu else CPU_MAX_MODEL_LEN):
        engine["max_model_len"] = longest
    if settings.on_gpu:
        engine["gpu_memory_utilization"] = settings.vllm_gpu_memory_utilization
        engine["tensor_parallel_size"] = settings.vllm_tensor_parallel_size
    else:
        engine |= {
            "kv_cache_memory_bytes": int(settings.vllm_kv_cache_gib * GiB),
            "block_size": 32,  # granularity of shared prefixes, in tokens
            # A prompt that is read in several steps crashes a CPU engine if its call has a seed:
            # vLLM then rewinds a generator that cannot be rewound ("CPU Generator does not use
            # offset").
            "enable_chunked_prefill": False,
            # Compiling takes minutes on few cores and made a small model no faster.
            "enforce_eager": True,
        }
    source = settings.vllm_model_source or settings.vllm_model
    return LLMConfig(
        model_loading_config={
            "model_id": settings.vllm_model,
            "model_source": source,
        },
        accelerator_config={"kind": "gpu" if settings.on_gpu else "cpu"},
        engine_kwargs=engine,
        runtime_env=_runtime_env(settings),
        callback_config=CallbackConfig(
            "workers.serve.NoDownload" if Path(source).is_dir() else CallbackBase
        ),
        deployment_config={
            "autoscaling_config": {
                "min_replicas": settings.vllm_min_replicas,
                "max_replicas": settings.vllm_max_replicas,
                "target_ongoing_requests": settings.vllm_max_num_seqs,
            },
            # Above the target, so that a replica's queue shows that one more is needed.
            "max_ongoing_requests": 4 * settings.vllm_max_num_seqs,
            "graceful_shutdown_timeout_s": 10,
            **_router(settings),
        },
        log_engine_metrics=True,
    )


def _router(settings: ServeSettings) -> dict[str, Any]:
    """Return the choice of a replica: the calls of a council go to the one with their prefix."""
    if settings.vllm_max_replicas == 1:
        return {}
    return {
        "request_router_config": {
            "request_router_class": "ray.serve.llm.request_router.PrefixCacheAffinityRouter",
            # Beyond a full batch of difference, the shorter queue wins over the known prefix.
            "request_router_kwargs": {
                "imbalanced_threshold": settings.vllm_max_num_seqs,
                "do_eviction": True,
            },
        }
    }


def _runtime_env(settings: ServeSettings) -> dict[str, Any]:
    """Return the environment of the engine's processes."""
    if settings.on_gpu:
        return {}
    # Ray would give the engine one thread on any machine, and vLLM would pin it to a core that
    # others use. One core is left to the processes that feed the engine.
    threads = settings.vllm_threads or max(1, (os.cpu_count() or 1) - 1)
    return {"env_vars": {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}}


def app(args: dict[str, str]) -> serve.Application:
    """Return the Serve application; `args` override the settings, as a RayService passes them."""
    return _application(ServeSettings.model_validate(args), own=None)


def api(own: frozenset[str] | None) -> FastAPI:
    """Return Ray's FastAPI application, closed to web pages of other sites.

    Ray lets any page read its answers (CORS). No setting changes that.
    """
    closed: FastAPI = _ray_api()
    kept: list[Any] = [*closed.user_middleware]
    closed.user_middleware[:] = [each for each in kept if each.cls is not CORSMiddleware]
    closed.add_middleware(SameSite, own=own)
    return closed


_ray_api = ingress.init


def _application(settings: ServeSettings, own: frozenset[str] | None) -> serve.Application:
    ingress.init = lambda: api(own)
    return build_openai_app(
        {
            "llm_configs": [llm_config(settings)],
            "ingress_deployment_config": {
                "autoscaling_config": {"min_replicas": 1, "max_replicas": 1},
            },
        }
    )


def main() -> NoReturn:
    """Serve until SIGTERM or SIGINT, then shut everything down."""
    settings = ServeSettings()
    if settings.ray_address:
        ray.init(address=settings.ray_address, log_to_driver=False)
    else:
        _start_ray(settings)
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray, which sets its own
        signal.signal(number, _stop)
    try:
        serve.start(
            proxy_location=ProxyLocation.HeadOnly,
            http_options=HTTPOptions(host=settings.serve_host, port=settings.serve_port),
        )
        # Clients on this machine; a cluster's have names that only its operator knows.
        here = settings.serve_host in LOOPBACK and not settings.ray_address
        own = own_hosts(settings.serve_port) if here else None
        serve.run(_application(settings, own), name=APP, route_prefix="/")
        print(f"serving {settings.vllm_model} on port {settings.serve_port}", flush=True)
        while True:
            signal.pause()
    finally:
        if settings.ray_address:
            serve.delete(APP)  # the cluster goes on; a local head ends with all it runs
        ray.shutdown()


def _stop(*_: object) -> None:
    """Leave `main` at any point: an app that is still starting can be stopped, too."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # Ray waits for its processes, which end with this process in any case.
    late = threading.Timer(STOPS_WITHIN_S, os._exit, (0,))
    late.daemon = True
    late.start()
    raise SystemExit(0)


def _start_ray(settings: ServeSettings) -> None:
    """Start a Ray head that ends with this process."""
    if settings.ray_temp_dir:
        for old in Path(settings.ray_temp_dir).glob("session_*"):  # of heads that have ended
            old.unlink() if old.is_symlink() else shutil.rmtree(old, ignore_errors=True)
    ray.init(
        address="local",
        num_cpus=3,  # slots, not cores: two for the engine's replica, one for the API's
        object_store_memory=100 * 1024**2,
        include_dashboard=False,
        _temp_dir=settings.ray_temp_dir,
        runtime_env={"worker_process_setup_hook": "workers.loopback.bind_replicas_to_loopback"},
    )


if __name__ == "__main__":
    main()
