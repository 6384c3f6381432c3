"""A way to a listener that can be broken: connections through it end, and can be made again."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading


class Proxy:
    """Passes bytes on between whoever connects to `endpoint` and a listener.

    Args:
        endpoint: of the listener, `tcp://ADDRESS:PORT`.
    """

    def __init__(self, endpoint: str) -> None:
        address, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        self._target = (address, int(port))
        self._listener = socket.create_server((address, 0))
        self.endpoint = f"tcp://{address}:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._over = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="proxy")
        self._thread.start()

    def _run(self) -> None:
        while not self._over:
            ready = self._selector.select(0.05)
            with self._lock:
                for key, _ in ready:
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.fileobj in self._pairs:
                        self._pass_on(key.fileobj)  # type: ignore[arg-type]

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        try:
            far = socket.create_connection(self._target, 5)
        except OSError:  # nobody listens there now
            near.close()
            return
        for one, other in ((near, far), (far, near)):
            one.settimeout(5)
            self._pairs[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _pass_on(self, source: socket.socket) -> None:
        try:
            data = source.recv(1 << 16)
            if data:
                self._pairs[source].sendall(data)
                return
        except OSError:
            pass  # as at the end of the connection
        self._end(source)

    def _end(self, one: socket.socket) -> None:
        for each in (one, self._pairs[one]):
            self._selector.unregister(each)
            del self._pairs[each]
            each.close()

    def cut(self) -> int:
        """End all connections; returns how many there were. New ones are let through."""
        with self._lock:
            count = len(self._pairs) // 2
            for each in list(self._pairs):
                if each in self._pairs:
                    self._end(each)
        return count

    def close(self) -> None:
        """End all, for good."""
        self._over = True
        self._thread.join(5)
        self.cut()
        self._selector.close()
        with contextlib.suppress(OSError):
            self._listener.close()
