"""Makes a cffi module's lazy types before several threads can.

cffi works out a struct's fields and a function's signature when they are first used. While it does so a garbage
collection may run Python code, which gives the interpreter's lock away. A second thread that uses the same struct or
function for the first time then meets a half-made one, and the process ends by SIGSEGV or SIGABRT. So each module that
wraps a cffi module (engine.py, fakeguest/fakeguest.py) calls realize_types at import, which one thread does.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def realize_types(ffi: "Any", lib: "Any") -> tuple[str, ...]:
    """Works out every struct, union and function that the cffi module declares. Gives the names of the structs and
    unions, without those whose fields C keeps to itself (`struct vnd_engine`). Costs about a millisecond."""
    for name in dir(lib):
        getattr(lib, name)
    typedefs, structs, unions = ffi.list_types()
    found = []
    for name in [*typedefs, *(f"struct {name}" for name in structs), *(f"union {name}" for name in unions)]:
        kind = ffi.typeof(name)
        if kind.kind not in ("struct", "union"):
            continue
        try:
            ffi.sizeof(kind)
        except ffi.error:  # declared without fields; cffi aborts the process when it is asked for them
            continue
        if kind.fields is not None:  # the look at the fields makes them
            found.append(name)
    return tuple(found)
