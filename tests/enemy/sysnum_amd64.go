package main

// Source: the kernel's arch/x86/entry/syscalls/syscall_64.tbl; from 424 on they are the same everywhere.
const (
	sysSetns        = 308
	sysFinitModule  = 313
	sysBPF          = 321
	sysPerfOpen     = 298
	sysNameToHandle = 303
	sysOpenByHandle = 304
	sysAddKey       = 248
	sysKeyctl       = 250
	sysOpenTree     = 428
	sysMoveMount    = 429
	sysPidfdOpen    = 434
	sysPidfdGetfd   = 438
	sysMountSetattr = 442
)
