"""Make ``algorithm=hpd`` a Hydra group choice of verl's own primary configs.

verl keeps ``algorithm:`` inline in ppo_trainer.yaml, without an ``algorithm`` entry in its defaults list, so
plain Hydra answers "no match in the defaults list". A ConfigSource, one of Hydra's documented plugin kinds,
serves verl's own YAML with the entry ``- algorithm: null`` appended. A null choice adds nothing, so a run that
does not name an algorithm composes exactly as without this package.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

GROUP = "algorithm"
SCHEME = "hpd-verl"
VERL_CONFIGS = "pkg://verl.trainer.config"


def config_dir() -> Path:
    """Our config folder: inside the installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _verl_config_dir() -> Path:
    spec = importlib.util.find_spec("verl")  # verl is being imported: this finds it without loading anything
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations))) / "trainer" / "config"


class VerlConfigSource(ConfigSource):
    """verl's primary configs that hold an inline ``algorithm`` node, with the group entry appended."""

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider=provider, path=path)
        self.directory = _verl_config_dir()

    @staticmethod
    def scheme() -> str:
        return SCHEME

    def available(self) -> bool:
        return self.directory.is_dir()

    def _read(self, config_path: str) -> tuple[dict[str, str | None], dict[Any, Any]] | None:
        """(header, content) of a primary config that needs the entry, else None."""
        name = self._normalize_file_name(config_path)
        file = self.directory / name
        if "/" in name or not file.is_file():
            return None
        text = file.read_text(encoding="utf-8")
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if text.strip() else None
        if not isinstance(content, dict) or GROUP not in content or "defaults" not in content:
            return None
        if any(isinstance(entry, dict) and GROUP in entry for entry in content["defaults"]):
            return None  # verl has made the group itself
        return ConfigSource._get_header_dict(text), content

    def load_config(self, config_path: str) -> ConfigResult:
        read = self._read(config_path)
        if read is None:
            raise ConfigLoadError(f"{self.full_path()}: {config_path} not found")
        header, content = read
        content["defaults"].append({GROUP: None})  # after _self_: merges over verl's inline node
        return ConfigResult(
            path=f"{self.scheme()}://{self.path}",
            provider=self.provider,
            config=OmegaConf.create(content),
            header=header,
        )

    def is_group(self, config_path: str) -> bool:
        return config_path in ("", "/")

    def is_config(self, config_path: str) -> bool:
        return self._read(config_path) is not None

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return []


class HPDSearchPath(SearchPathPlugin):
    """Puts the source above before verl's own folder, and our groups after everything."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        entries = search_path.get_path()
        if any(self._is_verl(entry.path) for entry in entries if entry.provider == "main"):
            search_path.prepend(provider="hpd_verl", path=f"{SCHEME}://verl")
        else:
            # A user's own folder is primary (--config-path): its files come first, then ours, then verl's.
            search_path.append(provider="hpd_verl", path=f"{SCHEME}://verl")
            if not any(self._is_verl(entry.path) for entry in entries):
                search_path.append(provider="verl", path=VERL_CONFIGS)
        search_path.append(provider="hpd_verl", path=f"file://{config_dir()}")

    @staticmethod
    def _is_verl(path: str | None) -> bool:
        if path == VERL_CONFIGS:
            return True
        local = (path or "").removeprefix("file://")
        return bool(local) and "://" not in local and Path(local).resolve() == _verl_config_dir().resolve()


def register() -> None:
    """Register the search path, the config source and the resolvers that hpd.yaml uses."""
    OmegaConf.register_new_resolver("hpd.is_null", lambda value: value is None, replace=True)
    # Resources for a Ray that the run starts: a logical GPU per rank, and those of the teacher's servers; verl reserves
    # 3 CPUs for each rank, and a few for its own actors. A running cluster has its own.
    for name, per_rank, more in (("hpd.ray_gpus", 1, 0), ("hpd.ray_cpus", 3, 2)):
        OmegaConf.register_new_resolver(
            name,
            lambda ranks, servers, per_rank=per_rank, more=more: (
                None if os.environ.get("RAY_ADDRESS") else per_rank * ranks + more + servers
            ),
            replace=True,
        )
    plugins = Plugins.instance()
    plugins.register(VerlConfigSource)
    plugins.register(HPDSearchPath)


# Here and not by the plugin: where this module is the first to import Hydra, the plugin sees it half imported.
register()
