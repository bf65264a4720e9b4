"""A server that acts in an odd way: odd.py PORT ACT."""

import os, socket, sys, time

port, act = int(sys.argv[1]), sys.argv[2]
server = socket.create_server(("127.0.0.1", port))
accepted = []
while True:
    accepted.append(server.accept()[0])
    if act == "mute" or act == "deaf" and len(accepted) < 3:
        continue
    request = accepted[-1].recv(999)
    if request.startswith(act.encode()):
        if os.fork():  # the child holds the connection open
            time.sleep(0.2)
            os._exit(3)
        time.sleep(60)
    if act in ("SSH-2.0", "HTTP"):
        accepted.pop().sendall(act.encode() + b"\r\n")
        continue
    accepted.pop().sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
