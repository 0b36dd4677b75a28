// Package integration drives the built nbdserve with the clients that people use:
// libnbd's tools, QEMU's, fio, a mounted file system. Its tests know the command
// line and the protocol only; they import nothing of this module.
//
// They need root, for mounts and loop devices, and the programs listed in main_test.go.
// All that a test starts or mounts lives in a process and a mount namespace of its own,
// which ends with the test binary, however that ends.
//
// NBDSERVE_LONG=1 runs more rounds of the tests that look for rare interleavings.
package integration
