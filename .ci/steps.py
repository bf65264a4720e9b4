"""A server that notes each request: steps.py PORT JOURNAL."""

import http.server, sys


class Steps(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.do_POST()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"] or 0)).decode()
        with open(sys.argv[2], "a") as journal:
            print(self.command, self.path, body, file=journal)
        self.send_response(500 if self.path == "/fails" else 200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")


http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Steps).serve_forever()
