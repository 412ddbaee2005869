"""Packages that run beside `sys.modules`, so that the host program neither sees them nor shares them."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

PARENT = __name__.rpartition(".")[0]


class PrivatePackage:
    """Runs the package in folder `root` without `sys.modules`; `given` modules stand in for its own."""

    def __init__(self, root: Path, given: Mapping[str, ModuleType], uses: Sequence[PrivatePackage] = ()) -> None:
        """What it imports of the packages `uses` is theirs."""
        self.root, self.modules = root, dict(given)
        self._packages = {package.root.name: package for package in (*uses, self)}
        self.builtins = {**vars(builtins), "__import__": self._import}

    def load(self, name: str) -> ModuleType:
        """The module with this dotted name, run on first use, an attribute of its package."""
        package, _, child = name.rpartition(".")
        parent = self.load(package) if package else None
        if name not in self.modules:
            self._run(name)
        if parent is not None:
            setattr(parent, child, self.modules[name])
        return self.modules[name]

    def _run(self, name: str) -> None:
        path = self.root.joinpath(*name.split(".")[1:])
        is_package = path.is_dir()
        path = path / "__init__.py" if is_package else path.with_suffix(".py")
        private_name = f"{PARENT}.{name}"  # so that its loggers are below ours
        module = ModuleType(private_name)
        package = name if is_package else name.rpartition(".")[0]
        vars(module).update(__file__=str(path), __package__=package, __builtins__=self.builtins)
        self.modules[name] = module
        try:
            exec(SourceFileLoader(private_name, str(path)).get_code(private_name), vars(module))  # type: ignore[arg-type]
        except BaseException:
            del self.modules[name]
            raise

    def _import(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        if level:
            name = f"{(globals or {})['__package__']}.{name}"
        package = self._packages.get(name.partition(".")[0])
        if package is None:
            return builtins.__import__(name, globals, locals, fromlist or (), 0)
        module = package.load(name)
        if not fromlist:
            return package.load(package.root.name)
        for item in fromlist:
            if item != "*" and not hasattr(module, item):
                package.load(f"{name}.{item}")
        return module
