# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Makes the Auto classes of Transformers return the models of this package, without importing Transformers.

A registration needs two modules: the one of Transformers that it writes to, and ours. It is done as soon as both are
there: at once if Transformers' module was imported before, otherwise by a finder on `sys.meta_path` after its import.
"""

import importlib
import importlib.abc
import sys


def register_configuration() -> None:
    """`AutoConfig` reads a `config.json` of model type "ijepa" as `IJepaConfig`."""
    from transformers import AutoConfig

    from .configuration_ijepa import IJepaConfig

    AutoConfig.register(IJepaConfig.model_type, IJepaConfig, exist_ok=True)


def register_models() -> None:
    """The Auto classes of models return this package's classes for an `IJepaConfig`."""
    from transformers.models.auto import modeling_auto

    from . import modeling_ijepa
    from .configuration_ijepa import IJepaConfig

    for auto_class, model_class in (
        (modeling_auto.AutoModel, modeling_ijepa.IJepaModel),
        (modeling_auto.AutoModelForPreTraining, modeling_ijepa.IJepaForPretraining),
        (modeling_auto.AutoModelForImageClassification, modeling_ijepa.IJepaForImageClassification),
        (modeling_auto.AutoBackbone, modeling_ijepa.IJepaBackbone),
    ):
        auto_class.register(IJepaConfig, model_class, exist_ok=True)


# (module of Transformers, our module, what is done when both are there)
REGISTRATIONS = (
    ("transformers.models.auto.configuration_auto", f"{__package__}.configuration_ijepa", register_configuration),
    ("transformers.models.auto.modeling_auto", f"{__package__}.modeling_ijepa", register_models),
)


class RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Finds the modules of `REGISTRATIONS` as the other finders do, and registers when they have been executed."""

    def __init__(self) -> None:
        self.executing: set[str] = set()

    def find_spec(self, fullname, path=None, target=None):
        if not any(fullname in names for *names, _ in REGISTRATIONS):
            return None
        specs = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            execute = self.registering(fullname, spec.loader.exec_module)
            spec.loader.exec_module = execute  # type: ignore[method-assign]
        return spec

    def registering(self, fullname, execute):
        """`exec_module` of the module's loader, with the registration after it."""

        def execute_and_register(module):
            self.executing.add(fullname)
            try:
                execute(module)
            finally:
                self.executing.discard(fullname)
            self.register(fullname)

        return execute_and_register

    def register(self, *fullnames: str) -> None:
        """Does what waits for one of these modules, unless the other module is not there or half executed.

        Our modules import Transformers' ones. So the second of the two that finishes registers.
        """
        for theirs, ours, action in REGISTRATIONS:
            if theirs in sys.modules and {theirs, ours} & set(fullnames):
                importlib.import_module(theirs)  # waits for another thread that imports it
                importlib.import_module(ours)
                if not {theirs, ours} & self.executing:
                    action()


def register_now_or_later() -> None:
    """Installs the finder once, and registers what can be registered now."""
    if not any(isinstance(finder, RegisterAfterImport) for finder in sys.meta_path):
        finder = RegisterAfterImport()
        sys.meta_path.insert(0, finder)
        finder.register(*(theirs for theirs, *_ in REGISTRATIONS))
