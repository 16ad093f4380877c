"""A server for an exported file: images over HTTP, in batches as they come, class names in the answers.

    pip install fastapi uvicorn
    vitprune export runs/deit_small_patch16_224-keep0.7 -o model.onnx
    python examples/serve.py model.onnx --port 8000
    curl --data-binary @cat.jpg http://localhost:8000/predict

    python examples/serve.py dense.onnx model.onnx --load path/to/images --clients 16 --seconds 20

Images that arrive while a batch runs make up the next one, at most --max-batch. They are decoded and prepared, as the
file's metadata says, in the threads of the requests. With --load nothing stays: the files are served one after another
in turns, each by a process of its own, while clients send the images of a folder as fast as they are answered; the
table has images per second, how long an answer takes, and how many differ from that to the image asked alone.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import io
import itertools
import json
import queue
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from torch import Tensor

from vitprune.data import eval_transform, image_files, open_image
from vitprune.loading.load import load_model
from vitprune.tasks import task_named


class Server:
    """Runs an exported file over batches of what was asked meanwhile, in a thread of its own."""

    def __init__(self, file: str, max_batch: int) -> None:
        loaded = load_model(file, exported=True)
        self.name, self.program, self.max_batch = loaded.name, loaded.model.eval(), max_batch
        self.task, self.names = task_named(loaded.task), dict(enumerate(loaded.class_names or ()))
        self.prepare = eval_transform(self.program)
        self.asked: queue.SimpleQueue[tuple[Tensor, Future[Tensor]]] = queue.SimpleQueue()
        self.num_batches = self.num_images = 0
        size = loaded.metadata.preprocessing.input_size  # type: ignore[union-attr]  # exported files have it
        for count in {1, max_batch}:  # the first pass of a size is slow
            self.program(torch.zeros(count, *size))
        threading.Thread(target=self._work, daemon=True).start()

    def answer(self, content: bytes) -> list[dict[str, Any]]:
        """What the model says of an image file: classes or labels with names, likeliest first; or its numbers."""
        future: Future[Tensor] = Future()
        self.asked.put((self.prepare(open_image(io.BytesIO(content))), future))
        output = future.result()[None]
        if (vectors := self.task.vectors(output)) is not None:
            return [{"vector": vectors[0].tolist()}]
        (answer,) = self.task.ranked(output, self.names, 5)
        return [each.model_dump() for each in answer] if isinstance(answer, list) else [{"text": answer}]

    def _work(self) -> None:
        while True:
            batch = [self.asked.get()]
            while len(batch) < self.max_batch and not self.asked.empty():
                batch.append(self.asked.get())
            images, futures = zip(*batch, strict=True)
            try:
                with torch.inference_mode():
                    outputs = self.program(torch.stack(images))
                self.num_batches, self.num_images = self.num_batches + 1, self.num_images + len(batch)
                for future, output in zip(futures, outputs, strict=True):
                    future.set_result(output)
            except Exception as error:  # the thread must go on
                for future in futures:
                    future.set_exception(error)


def application(server: Server) -> FastAPI:
    """The routes: POST /predict with the bytes of an image, GET /health."""
    app = FastAPI(title=server.name)

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, Any]:
        content = await request.body()
        try:
            answer = await asyncio.to_thread(server.answer, content)
        except (OSError, ValueError) as error:
            raise HTTPException(422, f"{len(content)} bytes that are no image: {type(error).__name__}") from error
        return {"model": server.name, "answer": answer}

    @app.get("/health")
    def health() -> dict[str, Any]:
        mean = server.num_images / server.num_batches if server.num_batches else None
        return {"model": server.name, "num_images": server.num_images, "mean_batch_size": mean}

    return app


def serve(file: str, max_batch: int, port: int) -> None:
    uvicorn.run(application(Server(file, max_batch)), host="127.0.0.1", port=port, log_level="warning")


def ask(connection: http.client.HTTPConnection, content: bytes) -> dict[str, Any]:
    """The likeliest of the answers to an image."""
    connection.request("POST", "/predict", body=content)
    response = connection.getresponse()
    said = json.loads(response.read())
    if response.status != 200:
        raise RuntimeError(f"answered {response.status}: {said}")
    first: dict[str, Any] = said["answer"][0]
    return first


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether an answer is the other but for the rounding of another batch size."""
    numbers = [each for each in (*one.values(), *other.values()) if isinstance(each, list | float)]
    texts = [{key: value for key, value in each.items() if isinstance(value, int | str)} for each in (one, other)]
    firsts, seconds = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
    return texts[0] == texts[1] and all(
        torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-2) for a, b in zip(firsts, seconds, strict=True)
    )


def load(port: int, images: list[bytes], clients: int, seconds: float) -> tuple[list[float], int]:
    """Seconds from each question to its answer, of clients that ask without a pause, and how many answers are wrong."""
    with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        pictures = itertools.cycle([(content, ask(connection, content)) for content in images])
    end, lock = time.perf_counter() + seconds, threading.Lock()

    def client(_: int) -> list[tuple[float, bool]]:
        taken = list[tuple[float, bool]]()
        with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
            while (started := time.perf_counter()) < end:
                with lock:
                    content, alone = next(pictures)
                said = ask(connection, content)
                taken.append((time.perf_counter() - started, same(said, alone)))
        return taken

    with ThreadPoolExecutor(clients) as pool:
        answers = [each for taken in pool.map(client, range(clients)) for each in taken]
    return [seconds for seconds, _ in answers], sum(not right for _, right in answers)


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=1)) as connection:
                connection.request("GET", "/health")
                connection.getresponse().read()
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("error: the server ended before it answered")


def compare(files: list[str], folder: Path, args: argparse.Namespace) -> None:
    """Serve each file in turns, and table what clients saw."""
    images = [path.read_bytes() for path in image_files(folder)][:64]
    rates: dict[str, list[float]] = {file: [] for file in files}
    times: dict[str, list[float]] = {file: [] for file in files}
    wrong = dict.fromkeys(files, 0)
    for number in range(args.rounds):
        for file in files if number % 2 == 0 else reversed(files):
            command = [sys.executable, __file__, file, "--port", str(args.port), "--max-batch", str(args.max_batch)]
            process = subprocess.Popen(command)
            try:
                wait_for(args.port, process)
                taken, differ = load(args.port, images, args.clients, args.seconds / args.rounds)
            finally:
                process.terminate()
                process.wait()
            rates[file].append(args.clients * len(taken) / sum(taken))
            times[file] += taken
            wrong[file] += differ
    first = files[0]
    print(
        f"| {args.clients} clients | images/s | beside the first | median answer, ms | 99 of 100 within, ms | wrong |"
    )
    print("|---|---|---|---|---|---|")
    for file in files:
        quotient = statistics.median(a / b for a, b in zip(rates[file], rates[first], strict=True))
        late = sorted(times[file])[int(0.99 * (len(times[file]) - 1))]
        cells = f"{statistics.median(rates[file]):.1f} | {quotient:.2f} x"
        answer = f"{1e3 * statistics.median(times[file]):.0f} | {1e3 * late:.0f}"
        print(f"| {Path(file).name} | {cells} | {answer} | {wrong[file]} of {len(times[file]):,} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help=".onnx or .xml of vitprune export")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--load", type=Path, metavar="FOLDER", help="measure with its images instead of serving")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20.0, help="how long each file is measured, in all rounds")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.load is not None:
        compare(args.files, args.load, args)
    elif len(args.files) == 1:
        serve(args.files[0], args.max_batch, args.port)
    else:
        parser.error("one FILE is served; several are compared with --load FOLDER")


if __name__ == "__main__":
    main()
