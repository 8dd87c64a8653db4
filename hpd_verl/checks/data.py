"""Data and student together: whether enough prompts fit the lengths."""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase
from verl.utils.tokenizer import normalize_token_ids

from hpd_verl.config import HPDConfig
from hpd_verl.data.demonstration import DemonstrationTokenizer, demonstration_text, has_demonstration
from hpd_verl.data.files import DEMONSTRATION, DataFile, one_line


def template_kwargs(data: DictConfig) -> dict[str, Any]:
    """verl's ``data.apply_chat_template_kwargs`` as a plain dict."""
    node = data.get("apply_chat_template_kwargs")
    container = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
    return {str(key): value for key, value in dict(container or {}).items()}  # type: ignore[arg-type]


def check_prompts_fit(
    setting: str,
    files: Sequence[DataFile],
    tokenizer: PreTrainedTokenizerBase,
    data: DictConfig,
    hpd: HPDConfig,
    needed_rows: int,
    max_samples: int,
) -> None:
    """Check that enough rows stay once overlong prompts are filtered out; looks at no more rows than it takes.

    Where nothing is filtered, overlong prompts lose their beginning: one that fits is enough.

    Args:
        setting: data.train_files or data.val_files.
        files: all of the setting's files.
        tokenizer: the student's.
        data: verl's ``data`` node.
        hpd: the algorithm's settings.
        needed_rows: rows that must stay, at least.
        max_samples: only so many rows are used, from the first on; all if not above 0.

    Raises:
        ValueError: too few rows stay, or the chat template refuses a prompt.
    """
    limit, filters = data.max_prompt_length, data.get("filter_overlong_prompts", True)
    drops = hpd.overlong_demonstration == "drop" and setting == "data.train_files"
    demonstrations = DemonstrationTokenizer(tokenizer, template_kwargs(data), data.max_response_length)
    kwargs = {key: value for key, value in template_kwargs(data).items() if key not in _TOKENIZER_KEYS}
    key, needed = data.get("prompt_key", "prompt"), needed_rows if filters or drops else 1
    seen = fitting = 0
    shortest: int | None = None
    for file in files:
        columns = [key, DEMONSTRATION] if drops and DEMONSTRATION in file.schema.names else [key]
        for index, row in enumerate(row for _, rows in file.batches(columns) for row in rows):
            if fitting >= needed or (0 < max_samples <= seen):
                break
            seen += 1
            try:
                length = len(
                    normalize_token_ids(
                        tokenizer.apply_chat_template(row[key], add_generation_prompt=True, tokenize=True, **kwargs)
                    )
                )
            except Exception as error:  # templates are programs: any error of Jinja or of what they call
                if filters:  # verl's filter drops such rows
                    continue
                where = file.row_name(index)
                raise ValueError(
                    f"{where}: the student's chat template refuses the prompt: {one_line(error)}; change its messages"
                ) from error
            shortest = length if shortest is None else min(shortest, length)
            if filters and length > limit:
                continue
            demonstration = row.get(DEMONSTRATION)
            if has_demonstration(demonstration):
                text = demonstration_text(demonstration, f"{file.name}: row {index}")
                if demonstrations.length(row[key], text) > data.max_response_length:
                    continue
            fitting += filters or drops or length <= limit
    if fitting >= needed:
        return
    if drops and shortest is not None and shortest <= limit:
        raise ValueError(
            f"data.max_response_length={data.max_response_length}: with algorithm.hpd.overlong_demonstration=drop "
            f"{fitting} of {seen} rows of {setting} stay, {needed} are needed; raise it, or truncate"
        )
    found = "its chat template refuses all prompts" if shortest is None else f"the shortest has {shortest} tokens"
    what = f"stay, {needed} are needed" if filters else "fit, the others would lose their beginning"
    raise ValueError(
        f"data.max_prompt_length={limit}: {fitting} of {seen} prompts of {setting} {what} ({found}); raise it"
    )


_TOKENIZER_KEYS = ("tokenize", "return_dict", "return_tensors")
"""Keys of data.apply_chat_template_kwargs that verl's filter leaves out."""
