"""Registries by the distribution-spec. docs/registries.md tells the rules; `images` and `cli` use the last three.

    hosts        registries.toml: mirrors, insecure registries, CAs -> endpoints
    authfile     docker's and podman's files of credentials, and credential helpers
    sockets      names, addresses, proxies
    watchdog     the eye on every exchange
    transport    connections, TLS; one request with its retries
    auth         challenges and tokens
    client       one repository at one endpoint: requests with authorization and redirects
    parallel     several transfers at once
    pull, push, login

Everything that a registry says is hostile until proven otherwise: documents are bounded, blobs verified, and whatever
is slower than a floor is given up.
"""
