"""How servers are called: keys, proxies, and which answers a later try may change."""

from __future__ import annotations

import ipaddress
import os
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from rlvid.errors import UserError


def may_recover(status: int) -> bool:
    """Whether another try may bring another answer than this HTTP status."""
    return status >= 500 or status in (408, 409, 425, 429)


def open_client(url: str, key_env: str, where: str, kind: Callable[..., Any], timeout: float | None = None) -> Any:
    """An `httpx.Client` or `httpx.AsyncClient` for a server, with its key. Proxies of the environment are used except
    for this machine and the hosts of `no_proxy`.

    Args:
        key_env: environment variable that holds the key, if it is set.
        where: key of the config that has the URL, for messages.

    Raises:
        UserError: a proxy of the environment cannot be used.
    """
    key, host = os.environ.get(key_env), urlsplit(url).hostname or ""
    try:
        is_direct = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_direct = host == "localhost" or host.endswith(".localhost")
    try:
        return kind(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            follow_redirects=False,
            timeout=timeout,
            trust_env=not (is_direct or urllib.request.proxy_bypass(host)),
        )
    except ImportError as e:  # httpx reads the proxies of all schemes, also those that this host would not use
        raise UserError(
            f"{where}: the environment names a SOCKS proxy (all_proxy), for which httpx needs a package: "
            f"pip install socksio, or add {host} to no_proxy"
        ) from e
    except ValueError as e:
        raise UserError(f"{where}: a proxy of the environment (http_proxy, all_proxy) cannot be used: {e}") from e
