"""``python flood.py ADDRESS``: datagrams of random bytes into the guest, 600 a second, until it is stopped.

Each is larger than a page, so that the guest puts nothing of its own behind a frame: what lies in the last
pages of one is written by the device alone.  A process of its own, because it runs inside a test's network.
"""

import os
import socket
import sys
import time

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    print("flood", flush=True)
    while True:
        for _ in range(6):
            s.sendto(os.urandom(8000), (sys.argv[1], 9))  # discard
        time.sleep(0.01)
