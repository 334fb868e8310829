"""Runs DXC, the compiler of DX12, on Linux through ctypes, with the arguments that wgpu's DX12 backend passes in release builds.

As a program, `dxc.py LIBDXCOMPILER` reads one line of JSON per kernel and answers with one line. It compiles each kernel in a child
process, because the compiler can abort."""
import ctypes as C, json, os, queue, signal, subprocess, sys, threading, uuid

# The oldest shader model with 16-bit floats. The test writes HLSL for this model.
PROFILE = "cs_6_2"
ARGUMENTS = ["-T", PROFILE, "-HV", "2018", "-no-warnings", "-Ges", "-enable-16bit-types"]
# This warning cannot be turned off. The signing library exists on Windows only, and is not needed, because nothing that is compiled
# here will run.
UNSIGNED = "warning: DXIL signing library"
# A kernel that takes longer than this counts as crashed.
MOST_SECONDS = 120


def guid(text):
    return (C.c_ubyte * 16)(*uuid.UUID(text).bytes_le)


CLASS = guid("73e22d93-e6ce-47f3-b5bf-f0664f39c1b0")
COMPILER = guid("228b4687-5a6a-4730-900c-9702b2203f54")
RESULT = guid("58346cda-dde7-4497-9461-6f87af5e0659")
VERSION = guid("b04f5b50-2059-4f12-a8ff-a1e0cde1cc7e")


class Source(C.Structure):
    _fields_ = [("text", C.c_void_p), ("size", C.c_size_t), ("encoding", C.c_uint32)]


def method(this, index, result, *args):
    """Returns a method of a COM object by its index in the object's method table."""
    table = C.cast(C.cast(this, C.POINTER(C.c_void_p))[0], C.POINTER(C.c_void_p))
    return C.CFUNCTYPE(result, C.c_void_p, *args)(table[index])


def instance(library, interface):
    create = C.CDLL(library).DxcCreateInstance
    create.argtypes, create.restype = [C.c_void_p, C.c_void_p, C.POINTER(C.c_void_p)], C.c_int32
    made = C.c_void_p()
    if create(CLASS, interface, C.byref(made)):
        sys.exit(f"{library} makes no compiler")
    return made.value


def version(library):
    info, major, minor = instance(library, VERSION), C.c_uint32(), C.c_uint32()
    numbers = C.POINTER(C.c_uint32)
    method(info, 3, C.c_int32, numbers, numbers)(info, C.byref(major), C.byref(minor))
    return f"{major.value}.{minor.value}"


def compile(compiler, text, entry):
    """Returns the compiler's messages, which are empty if it accepts the kernel. Like wgpu, this takes any message for an error."""
    arguments = ["-E", entry, *ARGUMENTS]
    held, argv = C.create_string_buffer(text, len(text)), (C.c_wchar_p * len(arguments))(*arguments)
    source = Source(C.cast(held, C.c_void_p), len(text), 65001)
    result, status, blob = C.c_void_p(), C.c_int32(), C.c_void_p()
    call = method(compiler, 3, C.c_int32, C.c_void_p, C.c_void_p, C.c_uint32, C.c_void_p, C.c_void_p, C.POINTER(C.c_void_p))
    code = call(compiler, C.addressof(source), C.addressof(argv), len(arguments), None, C.addressof(RESULT), C.byref(result))
    if code:
        return f"no result, {code & 0xFFFFFFFF:#x}"
    method(result.value, 3, C.c_int32, C.POINTER(C.c_int32))(result.value, C.byref(status))
    method(result.value, 5, C.c_int32, C.POINTER(C.c_void_p))(result.value, C.byref(blob))
    said = ""
    if blob.value:
        size = method(blob.value, 4, C.c_size_t)(blob.value)
        said = C.string_at(method(blob.value, 3, C.c_void_p)(blob.value), size).decode("utf8", "replace").strip("\0")
        said = "\n".join(line for line in said.splitlines() if line.strip() and not line.startswith(UNSIGNED))
    return said or ("failed without a word" if status.value else "")


def in_child(compiler, path, entry):
    """Compiles one kernel in a child process. Returns its state and the compiler's messages."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        signal.alarm(MOST_SECONDS)
        with open(path, "rb") as file:
            said = compile(compiler, file.read(), entry)
        os.write(write, ("refused\n" + said if said else "ok\n").encode()[:4000])
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        answer = pipe.read().decode("utf8", "replace")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        return "crashed", f"took more than {MOST_SECONDS} s" if code == -signal.SIGALRM else f"signal {-code}"
    state, said = answer.split("\n", 1)
    return state, said


def serve(library):
    compiler = instance(library, COMPILER)
    for line in sys.stdin:
        print(json.dumps(in_child(compiler, *json.loads(line))), flush=True)


def check(library, folder, records, progress):
    """Checks all kernels, with one process per core."""
    from .common import Result, cores, first_error

    waiting, results = queue.Queue(), [None] * len(records)
    for item in enumerate(records):
        waiting.put(item)

    def work():
        with subprocess.Popen(
            [sys.executable, __file__, library], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            while True:
                try:
                    at, record = waiting.get_nowait()
                except queue.Empty:
                    process.stdin.close()
                    return
                print(json.dumps([str(folder / record["file"]), record["entry"]]), file=process.stdin, flush=True)
                state, said = json.loads(process.stdout.readline())
                results[at] = Result(record, state, first_error(said) if state == "refused" else said)
                progress.step()

    threads = [threading.Thread(target=work) for _ in range(cores())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if None in results:
        raise RuntimeError("a process that runs DXC ended before its kernels did")
    return results


if __name__ == "__main__":
    serve(sys.argv[1])
