"""Registers the package's PEFT methods without importing PEFT, which costs a second that loading a model must not.

If PEFT is imported already when `import bestiary` runs, the methods are registered at once. If not, a finder is put
first on `sys.meta_path`. It answers for the one name `peft` alone, with what the other finders find, and adds to the
execution of that module that our methods are registered afterwards and that the finder is taken away again. So it does
not matter who imports PEFT, and when: transformers does it where it loads a folder of an adapter.

Asking whether PEFT could be imported (`importlib.util.find_spec`, as transformers does) changes nothing, and an import
that fails leaves the finder in place for the next one.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


METHODS = ("bestiary.peft_methods",)
"""Modules that register methods when they are imported."""


def register_methods() -> None:
    """Import the modules that register our methods, and PEFT with them."""
    for name in METHODS:
        importlib.import_module(name)


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Run `action` now if the top-level module `name` is imported, else right after its import."""
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _AfterImport(name, action))


class _AfterImport(MetaPathFinder):
    def __init__(self, name: str, action: Callable[[], None]):
        self.name = name
        self.action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, _AfterImport))
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((each for each in found if each is not None), None)
        if spec is None or spec.loader is None:
            return spec
        loader = spec.loader
        execute = loader.exec_module  # bound, and found again when the attribute below is deleted

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            execute(module)
            sys.meta_path.remove(self)
            self.action()

        loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one object, made for this search
        return spec
