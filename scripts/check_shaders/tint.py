"""Runs Tint, the WGSL compiler of Chromium, through WebGPU in a headless browser with a software adapter. Each kernel becomes a
shader module, and each entry point a compute pipeline.

A page that is served on this machine compiles the kernels and posts the results. A kernel that crashes the browser's device counts
as crashed, and a new browser continues with the next one."""
import json, os, queue, subprocess, tempfile, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from .common import Result, first_error

# A kernel that takes longer than this counts as crashed.
MOST_SECONDS = 120
# The time that a browser may take until it has an adapter.
START_SECONDS = 120
FLAGS = [
    "--headless=new",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--use-vulkan=swiftshader",
    "--enable-features=Vulkan,WebGPUDeveloperFeatures",
    "--enable-dawn-features=allow_unsafe_apis",
    # The watchdog would take a slow kernel on a software adapter for a hang.
    "--disable-gpu-watchdog",
]
# The reason why kernels with more bytes of `var<immediate>` than the browser allows (64) are not for this target.
LARGE = "immediates over {} bytes"


class Server:
    """Serves the page and the kernels that are left, and queues what the page posts."""

    def __init__(self):
        self.kernels, self.posts = [], queue.Queue()
        outer, page = self, Path(__file__).with_name("tint.html").read_bytes()

        class Handler(BaseHTTPRequestHandler):
            def answer(self, kind, body):
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                kernels = self.path == "/kernels.json"
                self.answer(*(("application/json", json.dumps(outer.kernels).encode()) if kernels else ("text/html", page)))

            def do_POST(self):
                outer.posts.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.answer("text/plain", b"")

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def address(self):
        return f"http://127.0.0.1:{self.http.server_address[1]}/"


class Browser:
    """A browser with a temporary profile."""

    def __init__(self, program, address):
        self.profile = tempfile.TemporaryDirectory(prefix="check-shaders-", ignore_cleanup_errors=True)
        # Chromium's sandbox does not work for root. It is not needed, because only our own page is opened.
        root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        self.process = subprocess.Popen(
            [program, *FLAGS, *root, f"--user-data-dir={self.profile.name}", address],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.profile.cleanup()


def texts(folder, records):
    """Returns the data of each kernel that the page needs, with all entry points of a kernel together."""
    kernels = {}
    for record in records:
        empty = {"entries": [], "features": record["features"], "immediates": record["immediates"], "file": record["file"]}
        kernels.setdefault(record["file"], empty)["entries"].append(record["entry"])
    for kernel in kernels.values():
        kernel["text"] = (folder / kernel["file"]).read_text()
    return kernels


def judged(record, post, limit):
    if "crashed" in post:
        return Result(record, "crashed", post["crashed"])
    if "missing" in post:
        return Result(record, "not for", post["missing"])
    words = post["words"][record["entry"]]
    if words:
        return Result(record, "refused", first_error(words))
    return Result(record, "not for", LARGE.format(limit)) if post["large"] else Result(record, "ok")


def check(program, folder, records, progress):
    """Returns the results, and the browser's name of its adapter."""
    waiting, posts, adapter, limit = texts(folder, records), {}, "", 0
    server = Server()

    def settle(file, post):
        posts[file] = post
        progress.step(len(waiting.pop(file)["entries"]))

    while waiting:
        server.kernels, server.posts = list(waiting.values()), queue.Queue()
        browser, current = Browser(program, server.address()), None
        try:
            while waiting:
                try:
                    post = server.posts.get(timeout=MOST_SECONDS if current else START_SECONDS)
                except queue.Empty:
                    post = {"lost": current, "why": f"no answer in {MOST_SECONDS} s"}
                if "adapter" in post:
                    adapter, limit = post["adapter"], post["immediates"]
                elif "begin" in post:
                    current = post["begin"]
                elif "file" in post:
                    settle(post["file"], post)
                elif post.get("lost"):
                    settle(post["lost"], {"crashed": post.get("why", "the browser's device was lost")})
                    break
                else:
                    raise RuntimeError(post.get("failed", f"the browser has opened no adapter in {START_SECONDS} s"))
        finally:
            browser.close()
    return [judged(record, posts[record["file"]], limit) for record in records], adapter
