"""The teacher that a configuration asks for."""

from pathlib import Path

import torch.distributed
from verl.workers.config import HFModelConfig
from verl.workers.engine_workers import TrainingWorker

from hpd_verl.config import HPDConfig
from hpd_verl.engine.causal_lm import head_scaling
from hpd_verl.engine.ranks import on_every_rank, on_rank_zero
from hpd_verl.teacher.colocated import ColocatedTeacher
from hpd_verl.teacher.model_config import shared_vocabulary_size
from hpd_verl.teacher.of_student import AveragedStudent, CurrentStudent
from hpd_verl.teacher.served.teacher import ServedTeacher
from hpd_verl.teacher.settings import TeacherSettings
from hpd_verl.teacher.several import SeveralTeachers
from hpd_verl.teacher.store.disk import DiskStore
from hpd_verl.teacher.store.identity import StoreIdentity, teacher_identity, tokenisation_hash
from hpd_verl.teacher.store.store import GIB, MemoryStore, TeacherStore, check_memory_store
from hpd_verl.teacher.store.teacher_files import FileHashes, teacher_hashes
from hpd_verl.teacher.stored import StoredTeacher
from hpd_verl.teacher.teacher import Teacher


def make_teacher(
    settings: TeacherSettings, config: HPDConfig, student: HFModelConfig, worker: TrainingWorker | None = None
) -> Teacher:
    """The teacher of one rank, or several as one, prepared; all ranks together.

    Args:
        settings: of the teacher.
        config: the algorithm's configuration.
        student: whose tokens and vocabulary rows have.
        worker: the student's, loaded, which ``teacher_ema`` needs.

    Raises:
        ValueError: the teacher's output layer is not understood, its store is not usable, or its server does not
            answer, or is another's.
    """
    if config.teachers is not None:
        return SeveralTeachers(
            {
                name: make_teacher(settings.of(name), config.of_teacher(name), student, worker)
                for name in config.teachers
            }
        )
    vocabulary_size = shared_vocabulary_size(student, settings.model)
    teacher: Teacher
    served = None
    if config.teacher_ema is not None:
        assert worker is not None
        teacher = CurrentStudent(worker, config, vocabulary_size)
        if config.teacher_ema > 0:  # in float32: half a percent of a small step would be lost in bfloat16
            teacher = AveragedStudent(settings.in_float32().worker(), worker, config, vocabulary_size)
    elif config.teacher_server.is_used:
        teacher = served = ServedTeacher(settings, config, vocabulary_size)
    else:
        teacher = ColocatedTeacher(settings.worker(), config, vocabulary_size)
    store = open_store(settings, config, student, served)
    if store is not None:
        teacher = StoredTeacher(store, teacher, head_scaling(settings.model.hf_config))
    teacher.prepare()
    return teacher


def open_store(
    settings: TeacherSettings, config: HPDConfig, student: HFModelConfig, served: ServedTeacher | None = None
) -> TeacherStore | None:
    """The store of a teacher's features; None where none is kept.

    Args:
        settings: of the teacher.
        config: the algorithm's configuration.
        student: whose tokens and vocabulary rows have.
        served: the teacher, where a server runs it.

    Raises:
        ValueError: a store in memory on several ranks, a folder that is another teacher's or cannot be used, weights of
            the teacher that are missing.
    """
    kind, max_bytes = config.teacher_cache, int(config.teacher_cache_max_gib * GIB)
    if kind == "off":
        return None

    def identity(teacher: str, teacher_config: str) -> StoreIdentity:
        return teacher_identity(
            teacher,
            teacher_config,
            temperature=config.temperature_of_teacher,
            vocabulary_size=shared_vocabulary_size(student, settings.model)
            if served is None
            else served.used_vocabulary_size,
            format=config.teacher_cache_format,
            dtype=config.teacher_cache_dtype,
            top_k=config.teacher_cache_top_k,
            bits=config.teacher_cache_bits,
            teacher_dtype=settings.dtype_name,
            tokenisation=tokenisation_hash(student.tokenizer.get_vocab(), student.tokenizer.chat_template),
        )

    if kind == "memory":
        check_memory_store(kind, torch.distributed.get_world_size())
        return MemoryStore(identity("", ""), max_bytes)  # of this process, which has one teacher
    assert config.teacher_cache_dir is not None  # HPDConfig requires it
    folder = Path(config.teacher_cache_dir).expanduser()
    if served is not None:
        known = identity(*served.hashes(folder))
        store = on_every_rank(lambda: DiskStore(folder, known, max_bytes))
        served.save(folder)  # once the folder is known to be this teacher's
        return store
    hashes = FileHashes(folder / "teacher_files.json")
    # Of rank 0: its copy of the weights is what verl loads, and other nodes need not read theirs.
    known = identity(*on_rank_zero(lambda: teacher_hashes(settings.model, hashes)))
    store = on_every_rank(lambda: DiskStore(folder, known, max_bytes))
    hashes.save()  # once the folder is known to be this teacher's
    return store
