"""The teacher behind a URL."""

import concurrent.futures
import hashlib
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id

from hpd_verl.config import HPDConfig
from hpd_verl.data import fields
from hpd_verl.data.response_tokens import response_tokens, row_numbers
from hpd_verl.engine.causal_lm import head_scaling
from hpd_verl.engine.ranks import on_every_rank, on_rank_zero, sums_of_ranks
from hpd_verl.errors import Refused, one_line
from hpd_verl.head.features import TeacherFeatures, TopKFeatures
from hpd_verl.head.output_head import OutputHead
from hpd_verl.objectives import LOG_ZERO
from hpd_verl.teacher.colocated import FeatureForm, FeatureMaker
from hpd_verl.teacher.served.client import HiddenStates, TopLogProbs
from hpd_verl.teacher.served.fetched import row_key
from hpd_verl.teacher.served.output_layer import output_layer
from hpd_verl.teacher.served.probe import Probe
from hpd_verl.teacher.served.servers import make_servers
from hpd_verl.teacher.served.waiting import LOOK, STOPPED, Patience, wait
from hpd_verl.teacher.settings import TeacherSettings
from hpd_verl.teacher.store.teacher_files import PATH_SETTING, config_hash
from hpd_verl.teacher.teacher import Teacher, TeacherUnavailable
from hpd_verl.teacher_server import NODE, URLS

logger = logging.getLogger(__name__)

Answer = tuple["concurrent.futures.Future[list[Tensor]]", int]
"""Where a row's hidden states will be: of a request, and which of its rows."""


class ServedTeacher(Teacher):
    """Hidden states from servers; the output layer is on each rank.

    Args:
        settings: of the teacher: its files hold the output layer.
        config: the algorithm's configuration, with ``teacher_server.urls``.
        vocabulary_size: the teacher's logits that are used.

    Raises:
        ValueError: an API key that no header can hold.
    """

    def __init__(self, settings: TeacherSettings, config: HPDConfig, vocabulary_size: int) -> None:
        self.model = settings.model
        self.dtype = settings.dtype
        self.compiled = bool(settings.config.engine_config.use_torch_compile)
        self.config = config
        self.vocabulary_size = vocabulary_size
        self.servers = make_servers(settings.model, settings.dtype, config, vocabulary_size)
        self._maker: FeatureMaker | None = None
        self._is_prepared = False
        self._ahead: dict[bytes, Answer] = {}
        """Rows of the last ``announce``; ``_before``: of the one before it, which may still be asked for."""
        self._before: dict[bytes, Answer] = {}
        self._waited = 0.0

    def prepare(self) -> None:
        """Wait for the servers, and read the output layer.

        Raises:
            TeacherUnavailable: a server does not answer in time.
            Refused: it serves another model, or the output layer is not in the teacher's files.
        """
        self._load()

    def _load(self) -> None:
        if self._is_prepared:
            return
        self._meet()
        self._is_prepared = True
        if isinstance(self.servers.question, TopLogProbs):
            return
        weight, bias = on_every_rank(lambda: output_layer(self.model, PATH_SETTING))
        assert weight is not None
        scale, soft_cap = head_scaling(self.model.hf_config)
        weight, bias = (None if each is None else each.to(get_device_id(), self.dtype) for each in (weight, bias))
        assert weight is not None
        head = OutputHead(weight, self.vocabulary_size, bias, scale, soft_cap)
        temperature, chunk_size = self.config.temperature_of_teacher, self.config.token_chunk_size
        self._maker = FeatureMaker(FeatureForm.of(self.config), head, temperature, chunk_size, self.compiled)

    def _meet(self) -> Probe:
        """Which model answers, the same for all ranks: a rank's servers must answer as rank 0's do."""

        def meet() -> Probe | Refused:
            try:
                connecting = self.servers.connect()
                wait([connecting])
                connecting.result()
            except Refused as error:  # on all ranks as what it is
                return error
            assert self.servers.reference is not None
            return self.servers.reference

        found = on_rank_zero(meet)
        if isinstance(found, Refused):
            raise found
        self._know(found)
        return found

    def _know(self, answer: Probe) -> None:
        """Which model it is; that also says what is asked of it.

        Raises:
            ValueError: log-probs are not enough for the run.
        """
        self.servers.reference = answer
        kind = HiddenStates if len(answer.hidden) > 1 else TopLogProbs
        self.servers.questions = [each for each in self.servers.questions if isinstance(each, kind)]
        if kind is TopLogProbs:
            self.config.check_served_top_k()
            if self.server_tokens > self.vocabulary_size:
                raise Refused(
                    f"{NODE}.features=topk: the teacher has {self.server_tokens} tokens, the student "
                    f"{self.vocabulary_size}; serve hidden states, or choose a student with all tokens"
                )

    @property
    def server_tokens(self) -> int:
        """Tokens over which a server normalises its log-probs: vLLM masks the vocabulary beyond the tokenizer's."""
        return min(len(self.model.tokenizer), self.model.hf_config.get_text_config().vocab_size)

    @property
    def used_vocabulary_size(self) -> int:
        """Tokens over which its features are normalised."""
        is_top_k = isinstance(self.servers.question, TopLogProbs)
        return min(self.server_tokens, self.vocabulary_size) if is_top_k else self.vocabulary_size

    def features(self, data: TensorDict, wanted: Sequence[int] | None = None) -> dict[int, TeacherFeatures]:
        self._load()
        numbers, keys = row_numbers(data).tolist(), self._keys(data)
        rows = range(len(keys)) if wanted is None else wanted
        wanted_keys = {keys[index] for index in rows}
        ahead = (self._before, self._ahead)
        answers = {key: asked.pop(key) for asked in ahead for key in wanted_keys if key in asked}
        answers |= self._fetched(data, wanted_keys)
        answers = {key: answer for key, answer in answers.items() if not _has_failed(answer)}
        answers |= self._ask({index: keys[index] for index in rows if keys[index] not in answers}, data)
        start = time.perf_counter()
        self._wait({id(future): future for future, _ in answers.values()}.values())
        self._waited += time.perf_counter() - start
        responses, starts = response_tokens(data), data["input_ids"].offsets()[:-1]
        ends = responses.lengths.cumsum(0).tolist()
        found = {}
        for index, length, end in zip(range(len(keys)), responses.lengths.tolist(), ends, strict=True):
            if keys[index] not in answers:
                continue
            future, place = answers[keys[index]]
            own = slice(end - length, end)
            answer = future.result()[place][(responses.positions[own] - starts[index]).cpu()]
            found[numbers[index]] = self._features(answer, responses.labels[own])
        return found

    def _fetched(self, data: TensorDict, keys: set[bytes]) -> dict[bytes, Answer]:
        """Of rows that another process has asked for.

        Raises:
            TeacherUnavailable: another model has answered there, whichever rows this rank has.
        """
        fetched = tu.get_non_tensor_data(data=data, key=fields.FETCHED, default=None)
        if fetched is None:
            return {}
        probe, known = fetched.probes.get(" ".join(self.config.teacher_server.urls)), self.servers.reference
        difference = None if probe is None or known is None else known.difference(probe.hidden, self.dtype)
        if difference is not None:
            raise TeacherUnavailable(
                f"{URLS}={self.config.teacher_server.urls}: not the model that has answered the ranks ({difference}); "
                "serve one model"
            )
        found: dict[bytes, Answer] = {}
        for key in keys & fetched.places.keys():
            future: concurrent.futures.Future[list[Tensor]] = concurrent.futures.Future()
            future.set_result([fetched.read(fetched.places[key])])
            found[key] = future, 0
        return found

    def known_form(self) -> TeacherFeatures | None:
        if not self._is_prepared:
            return None
        if self._maker is not None:
            return self._maker.known_form()
        width = 1 + 2 * self.config.teacher_server.top_k
        return self._features(torch.empty(0, width), torch.empty(0, dtype=torch.int64))

    def _features(self, answer: Tensor, labels: Tensor) -> TeacherFeatures:
        """Of tokens: what a server has answered, and the labels."""
        device = get_device_id()
        if self._maker is None:
            k = (answer.shape[1] - 1) // 2
            top = answer[:, 1 + k :].clamp_max(0.0)
            rest = torch.log1p(-top.exp().sum(-1).clamp_max(1 - 1e-12))
            return TopKFeatures(
                label_log_probs=answer[:, 0].float().clamp_min(LOG_ZERO).to(device),
                rest_log_prob=rest.float().clamp_min(LOG_ZERO).to(device),
                top_tokens=answer[:, 1 : 1 + k].long().to(device),
                top_log_probs=top.float().clamp_min(LOG_ZERO).to(device),
                teacher_vocabulary_size=self.used_vocabulary_size,
            )
        return self._maker.features(answer.to(device, self.dtype), self._maker.head, labels.to(device))

    def announce(self, data: TensorDict, wanted: Sequence[int] | None = None) -> None:
        if not self._is_prepared:  # behind a store that has had all rows so far
            return
        keys = self._keys(data)
        rows = range(len(keys)) if wanted is None else wanted
        for future in {id(future): future for future, _ in self._before.values()}.values():
            future.cancel()
        self._before, self._ahead = self._ahead, {}
        self._ahead = self._ask({index: keys[index] for index in rows if keys[index] not in self._before}, data)
        self._ahead |= {key: self._before.pop(key) for index in rows if (key := keys[index]) in self._before}

    def _keys(self, data: TensorDict) -> list[bytes]:
        return [row_key(self.config.teacher_server.urls, row) for row in data["input_ids"].unbind()]

    def _ask(self, rows: dict[int, bytes], data: TensorDict) -> dict[bytes, Answer]:
        """Ask for rows, those of the same tokens once."""
        by_key = {key: index for index, key in rows.items()}
        if not by_key:
            return {}
        ids = data["input_ids"].unbind()
        end = None if self.servers.question.sends_last else -1
        rows_of_keys = [ids[index][:end].tolist() for index in by_key.values()]
        future = self.servers.submit(rows_of_keys, lambda answer: answer)
        return {key: (future, place) for place, key in enumerate(by_key)}

    @staticmethod
    def _wait(futures: "Iterable[concurrent.futures.Future[list[Tensor]]]") -> None:
        """Until all ranks have their answers; all ranks together.

        Raises:
            TeacherUnavailable: on all ranks, where one gets none, or the run shall end and one still has none.
        """
        waiting, patience = list(futures), Patience()
        is_alone = torch.distributed.get_world_size() == 1
        while True:
            done, left = concurrent.futures.wait(waiting, LOOK, "FIRST_EXCEPTION")
            errors: list[BaseException] = [error for each in done if (error := each.exception()) is not None]
            if left and patience.is_over():
                errors.append(TeacherUnavailable(STOPPED))
            state = (len(left), errors[0] if errors else None)
            states = [state]
            if not is_alone:
                states = [state] * torch.distributed.get_world_size()
                torch.distributed.all_gather_object(states, state)
            error = next((error for _, error in states if error is not None), None)
            if isinstance(error, Refused):  # what repeating does not mend, too: the run has steps to save
                raise TeacherUnavailable(str(error)) from error
            if error is not None:
                raise error
            if not any(count for count, _ in states):
                return

    def metrics(self) -> dict[str, float]:
        counts, waited = self.servers.counts, self._waited
        self._waited = 0.0
        own = [counts.tokens, counts.bytes, counts.retries, waited, counts.tokens / max(counts.seconds, 1e-9)]
        tokens, size, retries, seconds, speed = sums_of_ranks(own)
        return {
            "timing_s/teacher_wait": seconds / torch.distributed.get_world_size(),
            "hpd/teacher_server_tokens": tokens,
            "hpd/teacher_server_tokens_per_s": speed,
            "hpd/teacher_server_gib": size / 2**30,
            "hpd/teacher_server_retries": retries,
        }

    # ------------------------------ which model it is ------------------------------

    def save(self, folder: Path) -> None:
        if torch.distributed.get_rank() == 0 and self.servers.reference is not None:
            self.servers.reference.write_new(folder)

    def resume(self, folder: Path) -> None:
        def compare() -> Probe | Refused | None:
            try:
                saved = Probe.read(folder)
                if saved is not None and self.servers.reference is not None:
                    self._compare(saved, self.servers.reference, f"trained up to {folder.name}")
            except ValueError as error:
                return Refused(one_line(error))
            return saved

        found = on_rank_zero(compare)
        if isinstance(found, Refused):
            raise found
        self.servers.reference = found or self.servers.reference

    def _compare(self, saved: Probe, answer: Probe, did: str) -> None:
        difference = "another probe" if saved.tokens != answer.tokens else saved.difference(answer.hidden, self.dtype)
        if difference is not None:
            raise Refused(
                f"{URLS}={self.config.teacher_server.urls}: not the teacher that {did} ({difference}); serve that one, "
                "or begin anew in another folder"
            )

    def hashes(self, folder: Path) -> tuple[str, str]:
        """What identifies this teacher in a store, as ``teacher_hashes`` of one beside the student; all ranks together.

        The store's folder keeps the probe's answer, so that a server whose last bits differ is the same teacher, and a
        full store needs no server.

        Raises:
            Refused: the server is another teacher than the store's.
        """

        def known() -> Probe | Refused | None:
            try:
                return Probe.read(folder)
            except ValueError as error:
                return Refused(one_line(error))

        found = on_rank_zero(known)
        if isinstance(found, Refused):
            raise found
        if found is None:
            found = self._meet()
        else:
            self._know(found)
        weight, bias = None, None
        if isinstance(self.servers.question, HiddenStates):
            weight, bias = output_layer(self.model, PATH_SETTING)
        digest = hashlib.sha256(found.digest.encode())
        for each in (weight, bias):
            if each is not None:
                digest.update(each.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest(), config_hash(self.model.hf_config, self.model.external_lib)


def _has_failed(answer: Answer) -> bool:
    """What failed in the background is asked for again."""
    future, _ = answer
    return future.done() and (future.cancelled() or future.exception() is not None)
