"""The VM engine: machines with a kernel of their own, run by QEMU.

Root disks: `templates` turns images into ext4 file systems (`mkfs`: what of it runs in the user namespace; `sizes`: how
large), `disks` keeps a machine's copy-on-write disk on top of one (`qcow2`: the head of its file format).
"""
