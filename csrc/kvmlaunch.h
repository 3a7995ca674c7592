/* SPDX-License-Identifier: Apache-2.0 */
/* What the extension is compiled from: our uAPI declarations and the C side's functions. */

#ifndef KVMLAUNCH_H
#define KVMLAUNCH_H

#include <errno.h>
#include <linux/falloc.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>

/* Calls that newer architectures lack. */
#ifndef SYS_open
#define SYS_open (-1)
#define SYS_access (-2)
#endif

#include "uapi_kvm.h"
#pragma pack(push, 1)
#include "uapi_sev.h"
#pragma pack(pop)
#include "uapi_newer.h"
#include "uapi_proposal.h"
#include "native.h"
#include "supervise.h"

/* What a system call returned, and its errno. */
static inline struct kl_result result(int64_t ret)
{
	struct kl_result r = { ret, ret == -1 ? errno : 0 };

	return r;
}

#endif
