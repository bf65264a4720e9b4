"""A process that listens on the port it reads, and prints what it receives."""

import socket, sys

server = socket.create_server(("127.0.0.1", int(sys.stdin.readline())))
print("listening", flush=True)
while True:
    client, _ = server.accept()
    client.settimeout(1)
    try:
        heard = client.recv(1000)
    except OSError:
        heard = b""
    if heard:
        print(heard, flush=True)
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    client.close()
