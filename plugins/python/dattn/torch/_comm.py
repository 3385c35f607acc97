"""A torch ProcessGroup, of any back end, as a communicator of the C interface (dattn_comm_callbacks).

Every transfer is ProcessGroup.send/recv on the caller's memory. Calls made by the main thread run on a thread of their own, for
which the main thread waits in Python: so Ctrl-C is noticed at once, and is never raised inside a callback, where C could not
carry it on. After a failure the group's connections are closed (`end`): ranks that wait for this one fail at once, and no
transfer is left that could write to memory which is freed when the call returns. Ranks that wait for a third one find the reason
in the group's store (`_wait_for`)."""
import ctypes
import functools
import queue
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from dattn import _c

TAG = 1 << 30  # our tags begin here: host programs use small ones
END_TAG = (1 << 31) - 1
END_WAIT_S = 60.0  # the longest that an interrupted call may go on computing
LOOK_EVERY_S = 1.0  # how often a waiting rank looks whether another one has ended the group
_made = {}  # communicators made so far, by group and ranks


class GroupComm:
    """The callbacks of one process group. `ranks`: the group's rank for each rank of the communicator, None = the same."""

    def __init__(self, group, ranks, timeout_s):
        self.group, self.timeout_s = group, timeout_s
        self.ranks = list(range(group.size())) if ranks is None else list(ranks)
        self.rank = self.ranks.index(group.rank())
        self._reason = ctypes.create_string_buffer(b"")
        self._requests, self._next = {}, 1
        self._ended = None  # why, once it is
        self._device = None if _carries_host_memory(group) else torch.device("cuda", torch.cuda.current_device())
        self._store = dist.distributed_c10d._world.pg_map[group][1]
        key = (group.group_name, tuple(self.ranks))  # a second communicator of the same ranks has tags of its own
        self._salt = _made[key] = _made.get(key, 0) + 1
        self._reason_key = f"dattn/{'-'.join(map(str, self.ranks))}/reason"
        self.callbacks = _c.Callbacks(
            rank=self.rank, size=len(self.ranks), start=_c.StartCallback(self._start), wait=_c.WaitCallback(self._wait),
            error=_c.ErrorCallback(self._error), abort=_c.AbortCallback(self._abort))

    def create(self, context):
        options = _c.CommOptions(timeout_s=self.timeout_s)
        return _c.create(_c.lib().dattn_comm_callbacks, context, ctypes.byref(self.callbacks), ctypes.byref(options))

    def close(self):
        """Lets go of the group, which the callbacks, in a cycle with this, would hold until the next collection of garbage: it
        must be gone, with its threads, before the interpreter is."""
        self.group = self._store = None
        self._requests.clear()

    def run(self, function, arguments):
        """A call of the C interface that may communicate. Raises what it fails with."""
        if threading.current_thread() is not threading.main_thread():
            _c.check(function(*arguments))
            return
        call = _Call(function, arguments)
        _calls().put(call)
        try:
            self._wait_for(call)
        except BaseException as error:  # Ctrl-C
            self.end(f"{type(error).__name__} on rank {self._global([self.rank])}")
            call.done.acquire(timeout=END_WAIT_S)
            raise
        if call.error is not None:
            raise call.error

    def _wait_for(self, call):
        while not call.done.acquire(timeout=LOOK_EVERY_S):
            told = self._told()
            if told:
                self.end(told)
            if told != "":  # ended, or the store does not answer
                call.done.acquire()
                return

    def _told(self):
        """Why another rank ended the group; "" if none did, None if the store does not answer."""
        return _briefly(lambda: self._store.get(self._reason_key).decode() if self._store.check([self._reason_key]) else "")

    def end(self, reason):
        """Closes the group's connections: a receive that runs out of time ends all transfers of a gloo group on both sides."""
        if self._ended is not None:
            return
        self._ended = reason
        _briefly(lambda: self._store.set(self._reason_key, reason))
        if self._device is not None:
            self.group.abort()
            return
        for peer in self.ranks:
            if peer != self.group.rank():
                try:
                    self.group.recv([torch.empty(1, dtype=torch.uint8)], peer, END_TAG).wait(timedelta(milliseconds=1))
                except RuntimeError:
                    pass  # what it is for

    # ---- callbacks: they return 0, or 1 with the reason in _reason; exceptions must not leave them ----

    def _start(self, _, tag, sends, send_count, receives, receive_count, request):
        try:
            if self._ended is not None:
                raise _c.PeerLost(self._ended)
            tag = TAG + (tag + 1000003 * self._salt) % (END_TAG - TAG)
            exchange = self._exchange if self._device is None else self._exchange_on_device
            self._requests[self._next] = exchange(tag, sends[:send_count], receives[:receive_count])
            request[0] = self._next
            self._next += 1
            return 0
        except BaseException as error:  # noqa: B036
            return self._failed(error)

    def _wait(self, _, number, timeout_s):
        deadline = time.monotonic() + timeout_s
        try:
            works, receives, peers = self._requests.pop(number)
            for work in works:
                work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
            if receives:
                torch.cuda.current_stream(self._device).synchronize()
            for host, staged in receives:
                host.copy_(staged)
            return 0
        except BaseException as error:  # noqa: B036
            if time.monotonic() >= deadline:
                error = _c.PeerLost(f"no answer within {timeout_s:g} s (timeout_s) from rank {self._global(peers)}")
            return self._failed(error)

    def _error(self, _):
        return ctypes.addressof(self._reason)

    def _abort(self, _, reason):
        try:
            self.end((reason or b"").decode(errors="replace"))
        except BaseException:  # noqa: B036  the first failure is the one to report
            pass

    def _failed(self, error):
        message = self._ended or str(error)
        told = self._told()
        if told and told != message:
            message += f"; before that, on another rank: {told}"
        self._reason = ctypes.create_string_buffer(message.encode())
        return 1

    # ---- transfers: (works, (host memory, its staging) of what is received, peers) ----

    def _exchange(self, tag, sends, receives):
        group, ranks = self.group, self.ranks
        works = [group.recv([_window(part)], ranks[part.peer], tag) for part in receives]
        works += [group.send([_window(part)], ranks[part.peer], tag) for part in sends]
        return works, (), [part.peer for part in (*receives, *sends)]

    def _exchange_on_device(self, tag, sends, receives):
        """For back ends that carry device memory only (NCCL): host parts are staged through the device, as one group."""
        operations, staging, peers = [], [], []
        for part in sends:
            staged = _window(part).to(self._device)
            operations.append(dist.P2POp(dist.isend, staged, group=self.group, group_peer=self.ranks[part.peer]))
            peers.append(part.peer)
        for part in receives:
            window = _window(part)
            staged = torch.empty_like(window, device=self._device)
            staging.append((window, staged))
            operations.append(dist.P2POp(dist.irecv, staged, group=self.group, group_peer=self.ranks[part.peer]))
            peers.append(part.peer)
        return dist.batch_isend_irecv(operations), staging, peers

    def _global(self, peers):
        return " or ".join(str(dist.get_global_rank(self.group, self.ranks[peer])) for peer in sorted(set(peers)))


class _Call:
    """A call for another thread; `done` is released when it has returned."""
    __slots__ = ("function", "arguments", "done", "error")

    def __init__(self, function, arguments):
        self.function, self.arguments, self.error = function, arguments, None
        self.done = threading.Lock()
        self.done.acquire()


@functools.cache
def _calls():
    """The queue of the thread that runs the main thread's calls; one for all communicators."""
    calls = queue.SimpleQueue()
    threading.Thread(target=_serve, args=(calls,), daemon=True, name="dattn").start()
    return calls


def _serve(calls):
    while True:
        call = calls.get()
        try:
            _c.check(call.function(*call.arguments))
        except BaseException as error:  # noqa: B036  it is raised by the waiting thread
            call.error = error
        call.done.release()
        del call


def default_timeout_s(group):
    """The process group's own deadline."""
    device = torch.device("cpu") if _carries_host_memory(group) else torch.device("cuda")
    options = getattr(group._get_backend(device), "options", None)
    timeout = getattr(options, "_timeout", None)
    return timeout.total_seconds() if timeout is not None else 60.0


def _carries_host_memory(group):
    return torch.device("cpu") in group._device_types


def _window(part):
    """The part's memory as a tensor, not copied."""
    return torch.frombuffer((ctypes.c_char * part.bytes).from_address(part.data), dtype=torch.uint8)


def _briefly(action):
    """The action's result, or None where it fails or takes more than a second (the store's host may be gone)."""
    result = []

    def run():
        try:
            result.append(action())
        except Exception:
            pass

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(1.0)
    return result[0] if result else None
