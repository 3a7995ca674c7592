/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Numbers, sizes and offsets as compiled from the 6.12 uapi headers with gcc on
 * x86-64. Included by the extension (over our declarations) and by the check
 * over a kernel's own headers.
 */

#define KL_NUMBER(name, value) _Static_assert((unsigned long long)(name) == (unsigned long long)(value), #name)
#define KL_SIZE(type, size) _Static_assert(sizeof(type) == (size), #type)
#define KL_OFFSET(type, field, offset) _Static_assert(offsetof(type, field) == (offset), #type "." #field)

KL_NUMBER(KVM_GET_API_VERSION, 0x0000ae00);
KL_NUMBER(KVM_CREATE_VM, 0x0000ae01);
KL_NUMBER(KVM_CHECK_EXTENSION, 0x0000ae03);
KL_NUMBER(KVM_GET_VCPU_MMAP_SIZE, 0x0000ae04);
KL_NUMBER(KVM_GET_SUPPORTED_CPUID, 0xc008ae05);
KL_NUMBER(KVM_GET_EMULATED_CPUID, 0xc008ae09);
KL_NUMBER(KVM_GET_MSR_INDEX_LIST, 0xc004ae02);
KL_NUMBER(KVM_GET_MSR_FEATURE_INDEX_LIST, 0xc004ae0a);
KL_NUMBER(KVM_CREATE_VCPU, 0x0000ae41);
KL_NUMBER(KVM_GET_DIRTY_LOG, 0x4010ae42);
KL_NUMBER(KVM_SET_NR_MMU_PAGES, 0x0000ae44);
KL_NUMBER(KVM_REGISTER_COALESCED_MMIO, 0x4010ae67);
KL_NUMBER(KVM_UNREGISTER_COALESCED_MMIO, 0x4010ae68);
KL_NUMBER(KVM_CLEAR_DIRTY_LOG, 0xc018aec0);
KL_NUMBER(KVM_ENABLE_CAP, 0x4068aea3);
KL_NUMBER(KVM_SET_USER_MEMORY_REGION, 0x4020ae46);
KL_NUMBER(KVM_SET_USER_MEMORY_REGION2, 0x40a0ae49);
KL_NUMBER(KVM_SET_MEMORY_ATTRIBUTES, 0x4020aed2);
KL_NUMBER(KVM_CREATE_GUEST_MEMFD, 0xc040aed4);
KL_NUMBER(KVM_PRE_FAULT_MEMORY, 0xc040aed5);
KL_NUMBER(KVM_MEMORY_ENCRYPT_OP, 0xc008aeba);
KL_NUMBER(KVM_MEMORY_ENCRYPT_REG_REGION, 0x8010aebb);
KL_NUMBER(KVM_MEMORY_ENCRYPT_UNREG_REGION, 0x8010aebc);
KL_NUMBER(KVM_CREATE_IRQCHIP, 0x0000ae60);
KL_NUMBER(KVM_CREATE_PIT2, 0x4040ae77);
KL_NUMBER(KVM_IRQ_LINE, 0x4008ae61);
KL_NUMBER(KVM_IRQ_LINE_STATUS, 0xc008ae67);
KL_NUMBER(KVM_IRQFD, 0x4020ae76);
KL_NUMBER(KVM_IOEVENTFD, 0x4040ae79);
KL_NUMBER(KVM_SET_GSI_ROUTING, 0x4008ae6a);
KL_NUMBER(KVM_SIGNAL_MSI, 0x4020aea5);
KL_NUMBER(KVM_SET_TSS_ADDR, 0x0000ae47);
KL_NUMBER(KVM_SET_IDENTITY_MAP_ADDR, 0x4008ae48);
KL_NUMBER(KVM_SET_BOOT_CPU_ID, 0x0000ae78);
KL_NUMBER(KVM_SET_TSC_KHZ, 0x0000aea2);
KL_NUMBER(KVM_GET_TSC_KHZ, 0x0000aea3);
KL_NUMBER(KVM_GET_CLOCK, 0x8030ae7c);
KL_NUMBER(KVM_SET_CLOCK, 0x4030ae7b);
KL_NUMBER(KVM_X86_SET_MSR_FILTER, 0x4188aec6);
KL_NUMBER(KVM_GET_STATS_FD, 0x0000aece);
KL_NUMBER(KVM_RUN, 0x0000ae80);
KL_NUMBER(KVM_GET_REGS, 0x8090ae81);
KL_NUMBER(KVM_SET_REGS, 0x4090ae82);
KL_NUMBER(KVM_GET_SREGS, 0x8138ae83);
KL_NUMBER(KVM_SET_SREGS, 0x4138ae84);
KL_NUMBER(KVM_GET_SREGS2, 0x8140aecc);
KL_NUMBER(KVM_SET_SREGS2, 0x4140aecd);
KL_NUMBER(KVM_GET_FPU, 0x81a0ae8c);
KL_NUMBER(KVM_SET_FPU, 0x41a0ae8d);
KL_NUMBER(KVM_GET_XSAVE, 0x9000aea4);
KL_NUMBER(KVM_SET_XSAVE, 0x5000aea5);
KL_NUMBER(KVM_GET_XSAVE2, 0x9000aecf);
KL_NUMBER(KVM_GET_XCRS, 0x8188aea6);
KL_NUMBER(KVM_SET_XCRS, 0x4188aea7);
KL_NUMBER(KVM_GET_DEBUGREGS, 0x8080aea1);
KL_NUMBER(KVM_SET_DEBUGREGS, 0x4080aea2);
KL_NUMBER(KVM_GET_MSRS, 0xc008ae88);
KL_NUMBER(KVM_SET_MSRS, 0x4008ae89);
KL_NUMBER(KVM_GET_MP_STATE, 0x8004ae98);
KL_NUMBER(KVM_SET_MP_STATE, 0x4004ae99);
KL_NUMBER(KVM_GET_LAPIC, 0x8400ae8e);
KL_NUMBER(KVM_SET_LAPIC, 0x4400ae8f);
KL_NUMBER(KVM_SET_CPUID2, 0x4008ae90);
KL_NUMBER(KVM_GET_CPUID2, 0xc008ae91);
KL_NUMBER(KVM_GET_VCPU_EVENTS, 0x8040ae9f);
KL_NUMBER(KVM_SET_VCPU_EVENTS, 0x4040aea0);
KL_NUMBER(KVM_SET_GUEST_DEBUG, 0x4048ae9b);
KL_NUMBER(KVM_SET_SIGNAL_MASK, 0x4004ae8b);
KL_NUMBER(KVM_INTERRUPT, 0x4004ae86);
KL_NUMBER(KVM_NMI, 0x0000ae9a);
KL_NUMBER(KVM_TRANSLATE, 0xc018ae85);
KL_NUMBER(KVM_GET_DEVICE_ATTR, 0x4018aee2);
KL_NUMBER(KVM_SET_DEVICE_ATTR, 0x4018aee1);
KL_NUMBER(KVM_HAS_DEVICE_ATTR, 0x4018aee3);
KL_NUMBER(SEV_ISSUE_CMD, 0xc0105300);

KL_SIZE(struct kvm_sev_cmd, 0x18);
KL_OFFSET(struct kvm_sev_cmd, id, 0x000);
KL_OFFSET(struct kvm_sev_cmd, pad0, 0x004);
KL_OFFSET(struct kvm_sev_cmd, data, 0x008);
KL_OFFSET(struct kvm_sev_cmd, error, 0x010);
KL_OFFSET(struct kvm_sev_cmd, sev_fd, 0x014);

KL_SIZE(struct kvm_sev_init, 0x30);
KL_OFFSET(struct kvm_sev_init, vmsa_features, 0x000);
KL_OFFSET(struct kvm_sev_init, flags, 0x008);
KL_OFFSET(struct kvm_sev_init, ghcb_version, 0x00c);
KL_OFFSET(struct kvm_sev_init, pad1, 0x00e);
KL_OFFSET(struct kvm_sev_init, pad2, 0x010);

KL_SIZE(struct kvm_sev_snp_launch_start, 0x40);
KL_OFFSET(struct kvm_sev_snp_launch_start, policy, 0x000);
KL_OFFSET(struct kvm_sev_snp_launch_start, gosvw, 0x008);
KL_OFFSET(struct kvm_sev_snp_launch_start, flags, 0x018);
KL_OFFSET(struct kvm_sev_snp_launch_start, pad0, 0x01a);
KL_OFFSET(struct kvm_sev_snp_launch_start, pad1, 0x020);

KL_SIZE(struct kvm_sev_snp_launch_update, 0x40);
KL_OFFSET(struct kvm_sev_snp_launch_update, gfn_start, 0x000);
KL_OFFSET(struct kvm_sev_snp_launch_update, uaddr, 0x008);
KL_OFFSET(struct kvm_sev_snp_launch_update, len, 0x010);
KL_OFFSET(struct kvm_sev_snp_launch_update, type, 0x018);
KL_OFFSET(struct kvm_sev_snp_launch_update, pad0, 0x019);
KL_OFFSET(struct kvm_sev_snp_launch_update, flags, 0x01a);
KL_OFFSET(struct kvm_sev_snp_launch_update, pad1, 0x01c);
KL_OFFSET(struct kvm_sev_snp_launch_update, pad2, 0x020);

KL_SIZE(struct kvm_sev_snp_launch_finish, 0x58);
KL_OFFSET(struct kvm_sev_snp_launch_finish, id_block_uaddr, 0x000);
KL_OFFSET(struct kvm_sev_snp_launch_finish, id_auth_uaddr, 0x008);
KL_OFFSET(struct kvm_sev_snp_launch_finish, id_block_en, 0x010);
KL_OFFSET(struct kvm_sev_snp_launch_finish, auth_key_en, 0x011);
KL_OFFSET(struct kvm_sev_snp_launch_finish, vcek_disabled, 0x012);
KL_OFFSET(struct kvm_sev_snp_launch_finish, host_data, 0x013);
KL_OFFSET(struct kvm_sev_snp_launch_finish, pad0, 0x033);
KL_OFFSET(struct kvm_sev_snp_launch_finish, flags, 0x036);
KL_OFFSET(struct kvm_sev_snp_launch_finish, pad1, 0x038);

KL_SIZE(struct kvm_create_guest_memfd, 0x40);
KL_OFFSET(struct kvm_create_guest_memfd, size, 0x000);
KL_OFFSET(struct kvm_create_guest_memfd, flags, 0x008);
KL_OFFSET(struct kvm_create_guest_memfd, reserved, 0x010);

KL_SIZE(struct kvm_memory_attributes, 0x20);
KL_OFFSET(struct kvm_memory_attributes, address, 0x000);
KL_OFFSET(struct kvm_memory_attributes, size, 0x008);
KL_OFFSET(struct kvm_memory_attributes, attributes, 0x010);
KL_OFFSET(struct kvm_memory_attributes, flags, 0x018);

KL_SIZE(struct kvm_userspace_memory_region, 0x20);

KL_SIZE(struct kvm_userspace_memory_region2, 0xa0);
KL_OFFSET(struct kvm_userspace_memory_region2, slot, 0x000);
KL_OFFSET(struct kvm_userspace_memory_region2, flags, 0x004);
KL_OFFSET(struct kvm_userspace_memory_region2, guest_phys_addr, 0x008);
KL_OFFSET(struct kvm_userspace_memory_region2, memory_size, 0x010);
KL_OFFSET(struct kvm_userspace_memory_region2, userspace_addr, 0x018);
KL_OFFSET(struct kvm_userspace_memory_region2, guest_memfd_offset, 0x020);
KL_OFFSET(struct kvm_userspace_memory_region2, guest_memfd, 0x028);
KL_OFFSET(struct kvm_userspace_memory_region2, pad1, 0x02c);
KL_OFFSET(struct kvm_userspace_memory_region2, pad2, 0x030);

KL_SIZE(struct kvm_pre_fault_memory, 0x40);
KL_OFFSET(struct kvm_pre_fault_memory, gpa, 0x000);
KL_OFFSET(struct kvm_pre_fault_memory, size, 0x008);
KL_OFFSET(struct kvm_pre_fault_memory, flags, 0x010);
KL_OFFSET(struct kvm_pre_fault_memory, padding, 0x018);

KL_SIZE(struct kvm_enable_cap, 0x68);
KL_OFFSET(struct kvm_enable_cap, cap, 0x000);
KL_OFFSET(struct kvm_enable_cap, flags, 0x004);
KL_OFFSET(struct kvm_enable_cap, args, 0x008);
KL_OFFSET(struct kvm_enable_cap, pad, 0x028);

KL_SIZE(struct kvm_device_attr, 0x18);
KL_OFFSET(struct kvm_device_attr, flags, 0x000);
KL_OFFSET(struct kvm_device_attr, group, 0x004);
KL_OFFSET(struct kvm_device_attr, attr, 0x008);
KL_OFFSET(struct kvm_device_attr, addr, 0x010);

KL_SIZE(struct kvm_enc_region, 0x10);

KL_SIZE(struct kvm_run, 0x930);
KL_OFFSET(struct kvm_run, request_interrupt_window, 0x000);
KL_OFFSET(struct kvm_run, immediate_exit, 0x001);
KL_OFFSET(struct kvm_run, padding1, 0x002);
KL_OFFSET(struct kvm_run, exit_reason, 0x008);
KL_OFFSET(struct kvm_run, ready_for_interrupt_injection, 0x00c);
KL_OFFSET(struct kvm_run, if_flag, 0x00d);
KL_OFFSET(struct kvm_run, flags, 0x00e);
KL_OFFSET(struct kvm_run, cr8, 0x010);
KL_OFFSET(struct kvm_run, apic_base, 0x018);
KL_OFFSET(struct kvm_run, hw, 0x020);
KL_OFFSET(struct kvm_run, fail_entry.hardware_entry_failure_reason, 0x020);
KL_OFFSET(struct kvm_run, fail_entry.cpu, 0x028);
KL_OFFSET(struct kvm_run, io.direction, 0x020);
KL_OFFSET(struct kvm_run, io.size, 0x021);
KL_OFFSET(struct kvm_run, io.port, 0x022);
KL_OFFSET(struct kvm_run, io.count, 0x024);
KL_OFFSET(struct kvm_run, io.data_offset, 0x028);
KL_OFFSET(struct kvm_run, mmio.phys_addr, 0x020);
KL_OFFSET(struct kvm_run, mmio.data, 0x028);
KL_OFFSET(struct kvm_run, mmio.len, 0x030);
KL_OFFSET(struct kvm_run, mmio.is_write, 0x034);
KL_OFFSET(struct kvm_run, debug.arch.exception, 0x020);
KL_OFFSET(struct kvm_run, debug.arch.pc, 0x028);
KL_OFFSET(struct kvm_run, debug.arch.dr6, 0x030);
KL_OFFSET(struct kvm_run, debug.arch.dr7, 0x038);
KL_OFFSET(struct kvm_run, hypercall.nr, 0x020);
KL_OFFSET(struct kvm_run, hypercall.args, 0x028);
KL_OFFSET(struct kvm_run, hypercall.ret, 0x058);
KL_OFFSET(struct kvm_run, hypercall.flags, 0x060);
KL_OFFSET(struct kvm_run, internal.suberror, 0x020);
KL_OFFSET(struct kvm_run, internal.ndata, 0x024);
KL_OFFSET(struct kvm_run, internal.data, 0x028);
KL_OFFSET(struct kvm_run, emulation_failure.flags, 0x028);
KL_OFFSET(struct kvm_run, emulation_failure.insn_size, 0x030);
KL_OFFSET(struct kvm_run, emulation_failure.insn_bytes, 0x031);
KL_OFFSET(struct kvm_run, system_event.type, 0x020);
KL_OFFSET(struct kvm_run, system_event.ndata, 0x024);
KL_OFFSET(struct kvm_run, system_event.data, 0x028);
KL_OFFSET(struct kvm_run, eoi.vector, 0x020);
KL_OFFSET(struct kvm_run, msr.error, 0x020);
KL_OFFSET(struct kvm_run, msr.reason, 0x028);
KL_OFFSET(struct kvm_run, msr.index, 0x02c);
KL_OFFSET(struct kvm_run, msr.data, 0x030);
KL_OFFSET(struct kvm_run, memory_fault.flags, 0x020);
KL_OFFSET(struct kvm_run, memory_fault.gpa, 0x028);
KL_OFFSET(struct kvm_run, memory_fault.size, 0x030);
KL_OFFSET(struct kvm_run, notify.flags, 0x020);
KL_OFFSET(struct kvm_run, padding, 0x020);
KL_OFFSET(struct kvm_run, kvm_valid_regs, 0x120);
KL_OFFSET(struct kvm_run, kvm_dirty_regs, 0x128);
KL_OFFSET(struct kvm_run, s, 0x130);

KL_SIZE(struct kvm_regs, 0x90);
KL_OFFSET(struct kvm_regs, rax, 0x000);
KL_OFFSET(struct kvm_regs, rbx, 0x008);
KL_OFFSET(struct kvm_regs, rcx, 0x010);
KL_OFFSET(struct kvm_regs, rdx, 0x018);
KL_OFFSET(struct kvm_regs, rsi, 0x020);
KL_OFFSET(struct kvm_regs, rdi, 0x028);
KL_OFFSET(struct kvm_regs, rsp, 0x030);
KL_OFFSET(struct kvm_regs, rbp, 0x038);
KL_OFFSET(struct kvm_regs, r8, 0x040);
KL_OFFSET(struct kvm_regs, r15, 0x078);
KL_OFFSET(struct kvm_regs, rip, 0x080);
KL_OFFSET(struct kvm_regs, rflags, 0x088);

KL_SIZE(struct kvm_segment, 0x18);
KL_OFFSET(struct kvm_segment, base, 0x000);
KL_OFFSET(struct kvm_segment, limit, 0x008);
KL_OFFSET(struct kvm_segment, selector, 0x00c);
KL_OFFSET(struct kvm_segment, type, 0x00e);
KL_OFFSET(struct kvm_segment, present, 0x00f);
KL_OFFSET(struct kvm_segment, dpl, 0x010);
KL_OFFSET(struct kvm_segment, db, 0x011);
KL_OFFSET(struct kvm_segment, s, 0x012);
KL_OFFSET(struct kvm_segment, l, 0x013);
KL_OFFSET(struct kvm_segment, g, 0x014);
KL_OFFSET(struct kvm_segment, avl, 0x015);
KL_OFFSET(struct kvm_segment, unusable, 0x016);
KL_OFFSET(struct kvm_segment, padding, 0x017);

KL_SIZE(struct kvm_dtable, 0x10);
KL_OFFSET(struct kvm_dtable, base, 0x000);
KL_OFFSET(struct kvm_dtable, limit, 0x008);
KL_OFFSET(struct kvm_dtable, padding, 0x00a);

KL_SIZE(struct kvm_sregs, 0x138);
KL_OFFSET(struct kvm_sregs, cs, 0x000);
KL_OFFSET(struct kvm_sregs, ds, 0x018);
KL_OFFSET(struct kvm_sregs, es, 0x030);
KL_OFFSET(struct kvm_sregs, fs, 0x048);
KL_OFFSET(struct kvm_sregs, gs, 0x060);
KL_OFFSET(struct kvm_sregs, ss, 0x078);
KL_OFFSET(struct kvm_sregs, tr, 0x090);
KL_OFFSET(struct kvm_sregs, ldt, 0x0a8);
KL_OFFSET(struct kvm_sregs, gdt, 0x0c0);
KL_OFFSET(struct kvm_sregs, idt, 0x0d0);
KL_OFFSET(struct kvm_sregs, cr0, 0x0e0);
KL_OFFSET(struct kvm_sregs, cr2, 0x0e8);
KL_OFFSET(struct kvm_sregs, cr3, 0x0f0);
KL_OFFSET(struct kvm_sregs, cr4, 0x0f8);
KL_OFFSET(struct kvm_sregs, cr8, 0x100);
KL_OFFSET(struct kvm_sregs, efer, 0x108);
KL_OFFSET(struct kvm_sregs, apic_base, 0x110);
KL_OFFSET(struct kvm_sregs, interrupt_bitmap, 0x118);

KL_SIZE(struct kvm_sregs2, 0x140);
KL_OFFSET(struct kvm_sregs2, flags, 0x118);
KL_OFFSET(struct kvm_sregs2, pdptrs, 0x120);
KL_OFFSET(struct kvm_sregs2, apic_base, 0x110);

KL_SIZE(struct kvm_fpu, 0x1a0);

KL_SIZE(struct kvm_xsave, 0x1000);

KL_SIZE(struct kvm_xcrs, 0x188);
KL_OFFSET(struct kvm_xcrs, nr_xcrs, 0x000);
KL_OFFSET(struct kvm_xcrs, flags, 0x004);
KL_OFFSET(struct kvm_xcrs, xcrs, 0x008);
KL_OFFSET(struct kvm_xcrs, padding, 0x108);

KL_SIZE(struct kvm_xcr, 0x10);
KL_OFFSET(struct kvm_xcr, xcr, 0x000);
KL_OFFSET(struct kvm_xcr, value, 0x008);

KL_SIZE(struct kvm_debugregs, 0x80);
KL_OFFSET(struct kvm_debugregs, db, 0x000);
KL_OFFSET(struct kvm_debugregs, dr6, 0x020);
KL_OFFSET(struct kvm_debugregs, dr7, 0x028);
KL_OFFSET(struct kvm_debugregs, flags, 0x030);
KL_OFFSET(struct kvm_debugregs, reserved, 0x038);

KL_SIZE(struct kvm_msrs, 0x8);
KL_OFFSET(struct kvm_msrs, nmsrs, 0x000);
KL_OFFSET(struct kvm_msrs, pad, 0x004);

KL_SIZE(struct kvm_msr_entry, 0x10);
KL_OFFSET(struct kvm_msr_entry, index, 0x000);
KL_OFFSET(struct kvm_msr_entry, reserved, 0x004);
KL_OFFSET(struct kvm_msr_entry, data, 0x008);

KL_SIZE(struct kvm_cpuid2, 0x8);
KL_OFFSET(struct kvm_cpuid2, nent, 0x000);
KL_OFFSET(struct kvm_cpuid2, padding, 0x004);

KL_SIZE(struct kvm_cpuid_entry2, 0x28);
KL_OFFSET(struct kvm_cpuid_entry2, function, 0x000);
KL_OFFSET(struct kvm_cpuid_entry2, index, 0x004);
KL_OFFSET(struct kvm_cpuid_entry2, flags, 0x008);
KL_OFFSET(struct kvm_cpuid_entry2, eax, 0x00c);
KL_OFFSET(struct kvm_cpuid_entry2, ebx, 0x010);
KL_OFFSET(struct kvm_cpuid_entry2, ecx, 0x014);
KL_OFFSET(struct kvm_cpuid_entry2, edx, 0x018);
KL_OFFSET(struct kvm_cpuid_entry2, padding, 0x01c);

KL_SIZE(struct kvm_mp_state, 0x4);

KL_SIZE(struct kvm_lapic_state, 0x400);

KL_SIZE(struct kvm_vcpu_events, 0x40);
KL_OFFSET(struct kvm_run, s.regs.regs, 0x130);
KL_OFFSET(struct kvm_run, s.regs.sregs, 0x1c0);
KL_OFFSET(struct kvm_run, s.regs.events, 0x2f8);

KL_SIZE(struct kvm_guest_debug, 0x48);
KL_SIZE(struct kvm_debug_exit_arch, 0x20);

KL_SIZE(struct kvm_irqfd, 0x20);

KL_SIZE(struct kvm_ioeventfd, 0x40);
KL_SIZE(struct kvm_x86_mce, 0x40);
KL_SIZE(struct kvm_tpr_access_ctl, 0x28);
KL_SIZE(struct kvm_vapic_addr, 8);

KL_SIZE(struct kvm_irq_level, 0x8);

KL_SIZE(struct kvm_msi, 0x20);

KL_SIZE(struct kvm_pit_config, 0x40);

KL_SIZE(struct kvm_clock_data, 0x30);
KL_SIZE(struct kvm_coalesced_mmio_zone, 0x10);
KL_SIZE(struct kvm_coalesced_mmio, 0x18);
KL_OFFSET(struct kvm_coalesced_mmio_ring, coalesced_mmio, 0x008);
KL_SIZE(struct kvm_dirty_log, 0x10);
KL_SIZE(struct kvm_clear_dirty_log, 0x18);

KL_SIZE(struct kvm_irq_routing_entry, 0x30);

KL_SIZE(struct sev_issue_cmd, 0x10);
KL_OFFSET(struct sev_issue_cmd, cmd, 0x000);
KL_OFFSET(struct sev_issue_cmd, data, 0x004);
KL_OFFSET(struct sev_issue_cmd, error, 0x00c);

KL_SIZE(struct sev_user_data_status, 0xc);
KL_OFFSET(struct sev_user_data_status, api_major, 0x000);
KL_OFFSET(struct sev_user_data_status, api_minor, 0x001);
KL_OFFSET(struct sev_user_data_status, state, 0x002);
KL_OFFSET(struct sev_user_data_status, flags, 0x003);
KL_OFFSET(struct sev_user_data_status, build, 0x007);
KL_OFFSET(struct sev_user_data_status, guest_count, 0x008);

KL_SIZE(struct sev_user_data_snp_status, 0x20);
KL_OFFSET(struct sev_user_data_snp_status, api_major, 0x000);
KL_OFFSET(struct sev_user_data_snp_status, api_minor, 0x001);
KL_OFFSET(struct sev_user_data_snp_status, state, 0x002);
KL_OFFSET(struct sev_user_data_snp_status, build_id, 0x004);
KL_OFFSET(struct sev_user_data_snp_status, guest_count, 0x00c);
KL_OFFSET(struct sev_user_data_snp_status, current_tcb_version, 0x010);
KL_OFFSET(struct sev_user_data_snp_status, reported_tcb_version, 0x018);

KL_SIZE(struct sev_user_data_snp_config, 0x40);
KL_OFFSET(struct sev_user_data_snp_config, reported_tcb, 0x000);
KL_OFFSET(struct sev_user_data_snp_config, rsvd1, 0x00c);

KL_SIZE(struct sev_user_data_snp_vlek_load, 0x10);
KL_OFFSET(struct sev_user_data_snp_vlek_load, len, 0x000);
KL_OFFSET(struct sev_user_data_snp_vlek_load, vlek_wrapped_version, 0x004);
KL_OFFSET(struct sev_user_data_snp_vlek_load, rsvd, 0x005);
KL_OFFSET(struct sev_user_data_snp_vlek_load, vlek_wrapped_address, 0x008);

KL_SIZE(struct sev_user_data_snp_wrapped_vlek_hashstick, 0x1b0);

KL_SIZE(struct sev_user_data_get_id2, 0xc);
KL_OFFSET(struct sev_user_data_get_id2, address, 0x000);
KL_OFFSET(struct sev_user_data_get_id2, length, 0x008);

KL_SIZE(struct sev_user_data_get_id, 0x80);

KL_SIZE(struct sev_user_data_pdh_cert_export, 0x18);
KL_OFFSET(struct sev_user_data_pdh_cert_export, pdh_cert_address, 0x000);
KL_OFFSET(struct sev_user_data_pdh_cert_export, pdh_cert_len, 0x008);
KL_OFFSET(struct sev_user_data_pdh_cert_export, cert_chain_address, 0x00c);
KL_OFFSET(struct sev_user_data_pdh_cert_export, cert_chain_len, 0x014);

KL_SIZE(struct sev_user_data_pek_csr, 0xc);
KL_OFFSET(struct sev_user_data_pek_csr, address, 0x000);
KL_OFFSET(struct sev_user_data_pek_csr, length, 0x008);

KL_SIZE(struct sev_user_data_pek_cert_import, 0x18);
KL_NUMBER(SEV_RET_NO_FW_CALL, -1LL);
KL_NUMBER(SEV_RET_INVALID_PLATFORM_STATE, 0x00000001);
KL_NUMBER(SEV_RET_INVALID_GUEST_STATE, 0x00000002);
KL_NUMBER(SEV_RET_INVALID_CONFIG, 0x00000003);
KL_NUMBER(SEV_RET_INVALID_LEN, 0x00000004);
KL_NUMBER(SEV_RET_ALREADY_OWNED, 0x00000005);
KL_NUMBER(SEV_RET_INVALID_CERTIFICATE, 0x00000006);
KL_NUMBER(SEV_RET_POLICY_FAILURE, 0x00000007);
KL_NUMBER(SEV_RET_INACTIVE, 0x00000008);
KL_NUMBER(SEV_RET_INVALID_ADDRESS, 0x00000009);
KL_NUMBER(SEV_RET_BAD_SIGNATURE, 0x0000000a);
KL_NUMBER(SEV_RET_BAD_MEASUREMENT, 0x0000000b);
KL_NUMBER(SEV_RET_ASID_OWNED, 0x0000000c);
KL_NUMBER(SEV_RET_INVALID_ASID, 0x0000000d);
KL_NUMBER(SEV_RET_WBINVD_REQUIRED, 0x0000000e);
KL_NUMBER(SEV_RET_DFFLUSH_REQUIRED, 0x0000000f);
KL_NUMBER(SEV_RET_INVALID_GUEST, 0x00000010);
KL_NUMBER(SEV_RET_INVALID_COMMAND, 0x00000011);
KL_NUMBER(SEV_RET_ACTIVE, 0x00000012);
KL_NUMBER(SEV_RET_HWSEV_RET_PLATFORM, 0x00000013);
KL_NUMBER(SEV_RET_HWSEV_RET_UNSAFE, 0x00000014);
KL_NUMBER(SEV_RET_UNSUPPORTED, 0x00000015);
KL_NUMBER(SEV_RET_INVALID_PARAM, 0x00000016);
KL_NUMBER(SEV_RET_RESOURCE_LIMIT, 0x00000017);
KL_NUMBER(SEV_RET_SECURE_DATA_INVALID, 0x00000018);
KL_NUMBER(SEV_RET_INVALID_PAGE_SIZE, 0x00000019);
KL_NUMBER(SEV_FACTORY_RESET, 0x00000000);
KL_NUMBER(SEV_PLATFORM_STATUS, 0x00000001);
KL_NUMBER(SEV_PDH_CERT_EXPORT, 0x00000005);
KL_NUMBER(SEV_GET_ID2, 0x00000008);
KL_NUMBER(SNP_PLATFORM_STATUS, 0x00000009);
KL_NUMBER(SNP_COMMIT, 0x0000000a);
KL_NUMBER(SNP_SET_CONFIG, 0x0000000b);
KL_NUMBER(SNP_VLEK_LOAD, 0x0000000c);
KL_NUMBER(SEV_MAX, 0x0000000d);
KL_NUMBER(KVM_SEV_INIT2, 0x00000016);
KL_NUMBER(KVM_SEV_SNP_LAUNCH_START, 0x00000064);
KL_NUMBER(KVM_SEV_SNP_LAUNCH_UPDATE, 0x00000065);
KL_NUMBER(KVM_SEV_SNP_LAUNCH_FINISH, 0x00000066);
KL_NUMBER(KVM_MAP_GPA_RANGE_PAGE_SZ_4K, 0x00000000);
KL_NUMBER(KVM_MAP_GPA_RANGE_PAGE_SZ_2M, 0x00000001);
KL_NUMBER(KVM_MAP_GPA_RANGE_PAGE_SZ_1G, 0x00000002);
KL_NUMBER(KVM_MAP_GPA_RANGE_ENCRYPTED, 0x00000010);
KL_NUMBER(KVM_MAP_GPA_RANGE_DECRYPTED, 0x00000000);
KL_NUMBER(KVM_HC_MAP_GPA_RANGE, 0x0000000c);
KL_NUMBER(KVM_MEM_LOG_DIRTY_PAGES, 0x00000001);
KL_NUMBER(KVM_MEM_READONLY, 0x00000002);
KL_NUMBER(KVM_MEM_GUEST_MEMFD, 0x00000004);
KL_NUMBER(KVM_CPUID_FLAG_SIGNIFCANT_INDEX, 0x00000001);
