"""What takes the place of the verbs context's functions where pyverbs' pointers cannot be had: slow, but the same."""

from __future__ import annotations

import ctypes
import errno
import logging
from typing import Any

from mooncake_hpc.transports.rdma import verbs_kernels as layout

log = logging.getLogger(__name__)

_POST = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
_NOTIFY = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Callbacks:
    """C functions over one queue pair's and one completion queue's methods; `post`, `poll`, `notify` are addresses."""

    def __init__(self, qp: Any, cq: Any, send_wr: Any, sge: Any) -> None:
        """`send_wr` and `sge` are pyverbs' classes of work requests and their scatter entries."""
        self._qp, self._cq, self._send_wr, self._sge = qp, cq, send_wr, sge
        self._functions = _POST(self._post), _POST(self._poll), _NOTIFY(self._notify)
        self.post, self.poll, self.notify = (
            int(ctypes.cast(function, ctypes.c_void_p).value or 0) for function in self._functions
        )

    def _post(self, _handle: int, address: int, bad: int) -> int:
        while address:
            try:
                self._qp.post_send(self._request(address))
            except Exception as error:
                log.debug("post_send: %s", error)
                ctypes.c_int64.from_address(bad).value = address
                return int(getattr(error, "error_code", 0) or errno.EIO)
            address = _word(address + layout.WR_NEXT)
        return 0

    def _request(self, address: int) -> Any:
        entry = _word(address + layout.WR_SGES)
        length_key = _word(entry + layout.SGE_LENGTH_KEY)
        piece = self._sge(_word(entry + layout.SGE_ADDRESS), length_key & 0xFFFFFFFF, length_key >> 32)
        request = self._send_wr(
            wr_id=_word(address + layout.WR_ID),
            num_sge=1,
            sg=[piece],
            opcode=_word(address + layout.WR_COUNT_OPCODE) >> 32,
            send_flags=_word(address + layout.WR_FLAGS) & 0xFFFFFFFF,
        )
        request.set_wr_rdma(_word(address + layout.WR_KEY) & 0xFFFFFFFF, _word(address + layout.WR_REMOTE))
        return request

    def _poll(self, _handle: int, most: int, address: int) -> int:
        try:
            count, completions = self._cq.poll(most)
        except Exception as error:
            log.debug("poll_cq: %s", error)
            return -1
        for number, completion in enumerate(completions):
            at = address + layout.WC * number
            ctypes.c_uint64.from_address(at + layout.WC_ID).value = completion.wr_id
            ctypes.c_uint32.from_address(at + layout.WC_STATUS).value = completion.status
            ctypes.c_uint32.from_address(at + layout.WC_VENDOR).value = completion.vendor_err
        return int(count)

    def _notify(self, _handle: int, _solicited: int) -> int:
        try:
            self._cq.req_notify()
        except Exception as error:
            log.debug("req_notify_cq: %s", error)
            return errno.EIO
        return 0


def _word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value
