"""A server that terminates TLS before a port, with a certificate of its own."""

import contextlib
import socket
import socketserver
import ssl
import subprocess
import threading


class Tls(socketserver.ThreadingTCPServer):
    """Terminates TLS before a port; `accepted` counts its connections."""

    daemon_threads = True

    def __init__(self, folder, port, name="IP:127.0.0.1"):
        self.certificate, key = write_certificate(folder, name)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(self.certificate, key)
        super().__init__(("127.0.0.1", 0), None)
        self.port, self._target, self.accepted = self.server_address[1], port, 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def finish_request(self, sock, _):
        with contextlib.suppress(OSError):
            client = self._context.wrap_socket(sock, server_side=True)
            self.accepted += 1
            server = socket.create_connection(("127.0.0.1", self._target))
            back = threading.Thread(target=copy_stream, args=(server, client))
            back.start()
            copy_stream(client, server)
            back.join()


def write_certificate(folder, name):
    """Write a certificate for this name and its key; their paths."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-nodes", "-days", "2",
         "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-keyout", key, "-out", certificate, "-subj", "/CN=far",
         "-addext", f"subjectAltName={name}"],
        check=True, stderr=subprocess.DEVNULL,
    )
    return certificate, key


def copy_stream(source, target):
    with contextlib.suppress(OSError, ValueError):
        while data := source.recv(65536):
            target.sendall(data)
    for sock in (source, target):
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)
