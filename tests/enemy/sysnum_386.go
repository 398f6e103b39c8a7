package main

// Source: the kernel's arch/x86/entry/syscalls/syscall_32.tbl.
const (
	sysSetns        = 346
	sysFinitModule  = 350
	sysBPF          = 357
	sysPerfOpen     = 336
	sysNameToHandle = 341
	sysOpenByHandle = 342
	sysAddKey       = 286
	sysKeyctl       = 288
	sysOpenTree     = 428
	sysMoveMount    = 429
	sysPidfdOpen    = 434
	sysPidfdGetfd   = 438
	sysMountSetattr = 442
)
