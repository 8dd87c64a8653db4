"""The pipelines by the name that ``run.choices.choose_pipeline`` returns."""

from hpd_verl.pipelines.one_pass import ONE_PASS
from hpd_verl.pipelines.pipeline import Pipeline
from hpd_verl.pipelines.staged import STAGED

PIPELINES: dict[str, Pipeline] = {"one_pass": ONE_PASS, "staged": STAGED}
