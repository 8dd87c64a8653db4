"""Flags of scripts that ask a model."""

import argparse
import json
import os
from typing import Any

from hpd_verl.tools.generation.answers import Generator, Sampling
from hpd_verl.tools.generation.endpoint import MAX_REFUSED, EndpointGenerator
from hpd_verl.tools.generation.vllm_engines import VLLMGenerator

API_KEY_VARIABLE = "OPENAI_API_KEY"


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the model, and how it runs."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="folder or hub name of a Hugging Face model, run here by vLLM")
    group.add_argument(
        "--endpoint",
        help=f"URL of an OpenAI-compatible server, as http://host:8000/v1; its key is the variable {API_KEY_VARIABLE}",
    )
    group.add_argument("--served_model", help="the model's name at --endpoint")
    group.add_argument(
        "--chat_template_kwargs",
        type=_json,
        default={},
        metavar="JSON",
        help='for the chat template, as {"enable_thinking": false}',
    )
    engine = parser.add_argument_group("vLLM")
    engine.add_argument("--tensor_parallel_size", type=int, default=1, help="devices per engine (%(default)s)")
    engine.add_argument("--data_parallel_size", type=int, default=1, help="engines (%(default)s)")
    engine.add_argument(
        "--dtype", default="auto", help="bfloat16, float16, float32, or auto: the model's (%(default)s)"
    )
    engine.add_argument(
        "--max_model_len", type=int, help="tokens of prompt and answer together (default: the model's context)"
    )
    engine.add_argument("--gpu_memory_utilization", type=float, default=0.9, help="share of memory (%(default)s)")
    engine.add_argument(
        "--engine_kwargs",
        type=_json,
        default={},
        metavar="JSON",
        help='further arguments of vLLM\'s LLM, as {"max_num_seqs": 64}',
    )
    engine.add_argument("--trust_remote_code", action="store_true", help="run code that the model brings")
    endpoint = parser.add_argument_group("endpoint")
    endpoint.add_argument("--concurrency", type=int, default=64, help="requests at a time (%(default)s)")
    endpoint.add_argument("--request_timeout", type=float, default=600, help="seconds per request (%(default)s)")
    endpoint.add_argument("--retries", type=int, default=5, help="retries of a failed request (%(default)s)")
    endpoint.add_argument(
        "--max_refused",
        type=float,
        default=MAX_REFUSED,
        help="share of prompts that its content filter may refuse; above it the run stops (%(default)s)",
    )
    endpoint.add_argument("--token_ids", action="store_true", help="request token ids (vLLM servers)")


def add_sampling_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Flags for the fields of ``Sampling``, with these defaults."""
    group = parser.add_argument_group("sampling")
    helps = {
        "n": "answers a prompt",
        "temperature": "0 is greedy",
        "top_p": "1 leaves all tokens in",
        "top_k": "-1 leaves all tokens in",
        "max_tokens": "of an answer",
        "seed": "of the random numbers",
    }
    for name, text in helps.items():
        default = defaults.get(name, getattr(Sampling, name))
        group.add_argument(
            f"--{name}", type=type(getattr(Sampling, name)), default=default, help=f"{text} (%(default)s)"
        )


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The sampling of these flags.

    Raises:
        ValueError: a value out of range.
    """
    return Sampling(args.n, args.temperature, args.top_p, args.top_k, args.max_tokens, args.seed)


def generator_of(args: argparse.Namespace) -> Generator:
    """The model of these flags; it starts with the first prompt.

    Raises:
        ValueError: flags that contradict, or a model's folder that is not whole.
    """
    if (args.model is None) == (args.endpoint is None):
        raise ValueError("give either --model, a folder or hub name, or --endpoint, a URL")
    for name in ("chat_template_kwargs", "engine_kwargs"):
        if not isinstance(getattr(args, name), dict):
            raise ValueError(f"--{name}={json.dumps(getattr(args, name))}: expected a JSON object")
    if args.endpoint is not None:
        if args.served_model is None:
            raise ValueError("--endpoint: give --served_model, the model's name there")
        return EndpointGenerator(
            args.endpoint,
            args.served_model,
            template_kwargs=args.chat_template_kwargs,
            concurrency=args.concurrency,
            timeout=args.request_timeout,
            retries=args.retries,
            token_ids=args.token_ids,
            api_key=os.environ.get(API_KEY_VARIABLE),
            max_refused=args.max_refused,
        )
    return VLLMGenerator(
        args.model,
        template_kwargs=args.chat_template_kwargs,
        tensor_parallel_size=args.tensor_parallel_size,
        data_parallel_size=args.data_parallel_size,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        gpu_memory_utilization=args.gpu_memory_utilization,
        trust_remote_code=args.trust_remote_code,
        engine_kwargs=args.engine_kwargs,
    )
