"""Started by Ray in the place of Python: asks the preload server to fork the worker, then waits for its end.

Only the standard library, and little of it: this runs before anything is set up. Without a server it becomes the
ordinary Python that Ray meant to start.
"""

import json
import os
import socket
import struct
import sys


def main() -> None:
    address, *arguments = sys.argv[1:]
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(address)
    except OSError:
        os.execv(sys.executable, [sys.executable, *arguments])
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    body = json.dumps(request).encode()
    socket.send_fds(connection, [struct.pack("!Q", len(body))], [0, 1, 2])
    connection.sendall(body)
    connection.recv(1)


main()
