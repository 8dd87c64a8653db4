"""Answers of a model to prompts, by vLLM's engine or an OpenAI-compatible endpoint, resumable."""

from hpd_verl.tools.generation.answers import Answer, GenerationError, Generator, Messages, Sampling
from hpd_verl.tools.generation.flags import add_arguments, add_sampling_arguments, generator_of, sampling_of
from hpd_verl.tools.generation.journal import Journal, generate, generate_all, open_journal

__all__ = [
    "Answer",
    "GenerationError",
    "Generator",
    "Journal",
    "Messages",
    "Sampling",
    "add_arguments",
    "add_sampling_arguments",
    "generate",
    "generate_all",
    "generator_of",
    "open_journal",
    "sampling_of",
]
