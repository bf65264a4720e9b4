"""A server whose first thread has ended: leaderless.py PORT FILE. It notes its start in
the file, and exits soon with status 3."""

import ctypes, os, socket, sys, threading, time

listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("started", file=open(sys.argv[2], "a"), flush=True)


def end():
    time.sleep(0.1)
    os._exit(3)


threading.Thread(target=end).start()
ctypes.CDLL(None).pthread_exit(None)
