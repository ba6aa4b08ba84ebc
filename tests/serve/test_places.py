"""Places come back whatever becomes of a request."""

import asyncio

from fastapi import Request

from lgvit_fast.deploy import Deployed
from lgvit_fast.serve import Settings, create_app
from tests.deploy import exports
from tests.serve.server import picture


def test_a_client_that_goes_before_the_first_line_leaves_its_places():
    service = create_app(Deployed(exports.folder(), threads=1), Settings()).state.service
    service.ready = True  # without its worker: nothing is answered
    form = b"".join(
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        + picture(i)
        + b"\r\n"
        for i in range(2)
    )
    headers = [(b"content-type", b"multipart/form-data; boundary=x")]
    body = form + b"--x--\r\n"
    headers.append((b"content-length", str(len(body)).encode()))
    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": headers}
    messages = iter([{"type": "http.request", "body": body}])

    async def receive():
        return next(messages, {"type": "http.disconnect"})

    async def send(message):
        await asyncio.sleep(0.05)

    async def request():
        response = await service.predict(Request(scope, receive))
        await response(scope, receive, send)
        with service.worker._changed:
            service.worker._drop()

    asyncio.run(request())
    assert service.worker.waiting == 0
