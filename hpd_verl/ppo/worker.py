"""verl's ActorRolloutRefWorker with a teacher: its reference model has a path of its own."""

from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import open_dict
from tensordict import TensorDict
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.distributed import initialize_global_process_group_ray
from verl.utils.profiler import DistProfiler
from verl.workers.config import HFModelConfig, TrainingWorkerConfig
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from hpd_verl.config import HPDConfig
from hpd_verl.data import fields
from hpd_verl.engine.ranks import seed_rank
from hpd_verl.engine.student_checkpoints import StudentCheckpoints
from hpd_verl.pipelines.choice import PIPELINES
from hpd_verl.ppo import messages
from hpd_verl.run.checkpoint import remove_files
from hpd_verl.run.choices import with_dtype
from hpd_verl.run.stopping import learn_of_stops
from hpd_verl.teacher.model_config import SEVERAL, teacher_model_config, teacher_nodes
from hpd_verl.teacher.served.fetched import Fetched


class HPDWorker(ActorRolloutRefWorker):
    """Student, its rollout adapter and the teacher, in one process per rank."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """Build teacher, student and rollout adapter, and the pipeline of the two models."""
        teacher: HFModelConfig = omega_conf_to_dataclass(teacher_model_config(self.config.model, self.config.ref.model))
        hpd = HPDConfig.from_config(self.config.hpd)
        several = {
            name: omega_conf_to_dataclass(teacher_model_config(self.config.model, node))
            for name, node in teacher_nodes(self.config.ref, hpd).items()
            if name
        }
        with open_dict(self.config):
            del self.config.ref.model  # verl's dataclass of the reference does not know it
            self.config.ref.pop(SEVERAL, None)
            for role in (self.config.actor, self.config.ref):
                role.fsdp_config = with_dtype(role.fsdp_config)
        learn_of_stops(messages.is_asked)
        pipeline = PIPELINES[hpd.pipeline]
        self.ref_worker_cls = partial(pipeline.teacher, model=teacher, **({"several": several} if several else {}))

        def student(config: TrainingWorkerConfig) -> TrainingWorker:
            initialize_global_process_group_ray(timeout_second=None)  # as verl's worker does, but before its seed
            seed_rank(hpd.seed)
            return pipeline.student_worker(config)

        self.actor_worker_cls = student
        self._fetched = Fetched()
        super().init_model()
        self.actor.engine.checkpoint_manager = StudentCheckpoints(self.actor.engine, hpd.check_saved_model)
        self.pipeline = pipeline.rank.of_workers(self.actor, self.ref, hpd, actor=self.loss_fn.keywords["config"])

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    @DistProfiler.annotate(color="red", role="actor_update", scheduled=True)
    def update_actor(self, data: TensorDict) -> TensorDict | None:
        """The pipeline's update of the student."""
        if self._fetched.probes:
            tu.assign_non_tensor_data(data, fields.FETCHED, self._fetched)
            self._fetched = Fetched()
        return self.pipeline.update(data)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def take_fetched(self, fetched: Fetched) -> None:
        """What the trainer has fetched for the next update; apart from it, whose settings verl copies."""
        self._fetched = fetched

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """verl's, with what a resumed run needs of the teacher."""
        super().save_checkpoint(local_path, *args, **kwargs)
        if self.pipeline.teacher is not None:
            self.pipeline.teacher.save(Path(local_path).parent)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_checkpoint(self, local_path: str | None, *args: Any, **kwargs: Any) -> None:
        """verl's, with the teacher's part."""
        super().load_checkpoint(local_path, *args, **kwargs)
        if self.pipeline.teacher is not None and local_path is not None:
            self.pipeline.teacher.resume(Path(local_path).parent)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def remove_checkpoints(self, folders: list[str]) -> None:
        """Remove this machine's files of checkpoints that the driver removed, if it has its own disk."""
        for folder in folders:
            remove_files(Path(folder))


class HPDWorkerWithoutRollout(HPDWorker):
    """The same for runs in which nothing is generated: no rollout adapter."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.role = "actor_ref"  # verl builds what the role's name contains
        self._is_rollout = False
