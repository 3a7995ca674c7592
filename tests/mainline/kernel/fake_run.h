/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Included by svm.c: where it would enter an SEV-ES guest, it calls the fake,
 * which is compiled with sev.c (fake_vcpu.h).
 */
#ifndef FAKE_RUN_H
#define FAKE_RUN_H

struct sev_es_save_area;
struct vcpu_svm;

void fake_vcpu_run(struct vcpu_svm *svm, bool spec_ctrl_intercepted,
		   struct sev_es_save_area *hostsa);

#define __svm_sev_es_vcpu_run	fake_vcpu_run

#endif /* FAKE_RUN_H */
