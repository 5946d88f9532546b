"""How a launcher or a sweeper of ours becomes one that Hydra knows.

Hydra takes plugins from modules called `hydra_plugins.<name>` alone, and looks them up by that path. Ours live here, so
a module of such a name is made when they are registered; it is on no disk.
"""

import contextlib
import importlib
import sys
from types import ModuleType

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.plugin import Plugin

from artifacts import plain

PACKAGE, NAME = "hydra_plugins", "ddm"

HYDRA_MODULE = f"{PACKAGE}.{NAME}"
"""The module that a plugin of ours says it is from: its class attribute `__module__`."""


def register(kind: type[Plugin], choice: str, defaults: object) -> None:
    """Let Hydra know a choice such as `hydra/launcher=ddm_ray`, with the fields of `defaults` as its keys."""
    group, _, name = choice.partition("=")
    Plugins.instance().register(kind)
    setattr(_module(), kind.__name__, kind)
    node = {"_target_": f"{HYDRA_MODULE}.{kind.__name__}", **plain(defaults)}
    ConfigStore.instance().store(name, node, group=group, provider=NAME)


def _module() -> ModuleType:
    """The module `hydra_plugins.ddm`, beside whatever other plugins are installed."""
    if HYDRA_MODULE not in sys.modules:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(PACKAGE)
        package = sys.modules.setdefault(PACKAGE, ModuleType(PACKAGE))
        module = sys.modules[HYDRA_MODULE] = ModuleType(HYDRA_MODULE)
        setattr(package, NAME, module)
    return sys.modules[HYDRA_MODULE]
