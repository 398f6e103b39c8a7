package vmboot

const sysFinitModule = 313 // Source: asm/unistd_64.h
