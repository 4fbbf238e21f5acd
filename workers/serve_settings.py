"""The settings of `python -m workers.serve`: environment variables.

Without Ray and vLLM, so that `python -m workers settings` can print them anywhere.
"""

from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class ServeSettings(BaseSettings):
    """The model that is served, and how much of the machine it may use."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True)

    vllm_model: str = Field(
        "smollm2-135m-instruct", min_length=1, description="the model's name in the API"
    )
    vllm_model_source: str | None = Field(
        None, description="the model's folder, or its name on a hub; unset: its name in the API"
    )
    vllm_device: Literal["auto", "cpu", "gpu"] = Field(
        "auto", description="`gpu` where CUDA answers, else `cpu`"
    )
    vllm_max_model_len: int | None = Field(
        None,
        ge=512,
        description="longest prompt with its answer, in tokens; unset: 2,048 on the CPU, the "
        "model's own on a GPU",
    )
    vllm_max_num_seqs: int = Field(
        8, ge=1, description="answers that the engine writes at the same time"
    )
    vllm_kv_cache_gib: float = Field(
        1.0, gt=0, description="memory of the prefix cache without a GPU, in GiB"
    )
    vllm_threads: int | None = Field(
        None, ge=1, description="threads of the engine without a GPU; unset: all cores but one"
    )
    vllm_gpu_memory_utilization: float = Field(
        0.85, gt=0, le=1, description="share of the GPU's memory that vLLM takes"
    )
    vllm_tensor_parallel_size: int = Field(
        1, ge=1, description="GPUs that share one copy of the model"
    )
    vllm_min_replicas: int = Field(1, ge=1, description="fewest copies of the model")
    vllm_max_replicas: int = Field(
        1, ge=1, description="most copies of the model; Ray adds one where all have much to do"
    )
    serve_host: str = Field("127.0.0.1", description="where the API listens")
    serve_port: int = Field(8000, ge=1, le=65535, description="port of the API")
    ray_address: str | None = Field(
        None, description="a Ray cluster that runs elsewhere; unset: one is started here"
    )
    ray_temp_dir: str | None = Field(None, description="folder of Ray's own sockets and logs")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.vllm_min_replicas > self.vllm_max_replicas:
            raise ValueError("VLLM_MIN_REPLICAS must be at most VLLM_MAX_REPLICAS")
        return self

    @property
    def on_gpu(self) -> bool:
        """Whether the engine runs on CUDA."""
        if self.vllm_device == "auto":
            import torch  # only the engine's packages have it

            return bool(torch.cuda.is_available())
        return self.vllm_device == "gpu"
