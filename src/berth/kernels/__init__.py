"""Kernels for VMs: from the distribution's packages into a store, and the initial RAM file system that boots them.

    model        what a stored kernel is
    store        `Kernels`: list, find, use, fetch, custom, remove; owns the layout's kernels directory
    record       the file that says what a stored kernel consists of, written last
    apt, running the sources: the distribution's packages, or the kernel that this host runs
    gather       what is taken from a source
    build        turns what was gathered into a stored kernel
    image        what a kernel image is, by its bytes; unpacks vmlinux and Image
    modules      which modules a VM needs, in the order in which they are loaded
    moduledisk   the kernel's modules as a read-only disk
    initramfs    the initial RAM file system; cpio writes its format

Layer 3: the VM engine and `cli` call it. docs/kernels.md says how it works.
"""
