"""Makes Triton's interpreter quicker, where its internals are those that are known here.

It puts its own functions in the place of ``triton.language``'s at a launch, and again at every call
of a device function within, where they are in place already: that takes a third of its time.
"""

from __future__ import annotations

import sys
from typing import Any


def patch_once_a_launch() -> bool:
    """``triton.language`` is patched by a launch, and by a device function only where it sees a
    module of the language that the launch did not. Returns whether that could be arranged."""
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    known = ("_patch_lang", "_LangPatchScope", "tl")
    if interpreter is None or not all(hasattr(interpreter, name) for name in known):
        return False
    plain, tl = interpreter._patch_lang, interpreter.tl
    if hasattr(plain, "patched_now"):
        return True
    patched_now: set[int] = set()

    class LaunchScope:
        """Of the outermost call: what was patched within it ends with it, too."""

        def __init__(self, scope: Any) -> None:
            self.scope = scope

        def restore(self) -> None:
            patched_now.clear()
            self.scope.restore()

    def patch_lang(fn: Any) -> Any:
        seen = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if seen and seen <= patched_now:
            return interpreter._LangPatchScope()  # nothing to restore
        outermost = not patched_now
        scope = plain(fn)
        patched_now.update(seen)
        return LaunchScope(scope) if outermost else scope

    patch_lang.patched_now = patched_now  # type: ignore[attr-defined]
    interpreter._patch_lang = patch_lang
    return True
