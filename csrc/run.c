/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>

#include "kvmlaunch.h"

/* Register offsets and bits of the 16550 (PC16550D data sheet, table II). */
enum {
	UART_DATA = 0,
	UART_IER = 1,
	UART_IIR = 2,
	UART_LCR = 3,
	UART_LSR = 5,
	UART_MSR = 6,
	LCR_DLAB = 0x80,
	IIR_NO_INTERRUPT = 0x01,
	LSR_TX_EMPTY = 0x60,
	MSR_DCD_DSR_CTS = 0xb0,
};

/* Most bytes of one string exit: KVM hands over a page at a time (kvm_sev_es_outs). */
enum { MAX_STRING = 4096 };

void kl_uart_out(struct kl_uart *uart, uint16_t port, uint8_t value)
{
	unsigned int reg = (uint16_t)(port - uart->base) & 7;

	if (reg <= UART_IER && (uart->regs[UART_LCR] & LCR_DLAB))
		uart->divisor[reg] = value;
	else if (reg != UART_DATA)
		uart->regs[reg] = value;
	else if (uart->used < sizeof(uart->text))
		uart->text[uart->used++] = value;
}

uint8_t kl_uart_in(struct kl_uart *uart, uint16_t port)
{
	unsigned int reg = (uint16_t)(port - uart->base) & 7;

	if (reg <= UART_IER && (uart->regs[UART_LCR] & LCR_DLAB))
		return uart->divisor[reg];
	switch (reg) {
	case UART_DATA:
		return 0;
	case UART_IIR:
		return IIR_NO_INTERRUPT;
	case UART_LSR:
		return LSR_TX_EMPTY;
	case UART_MSR:
		return MSR_DCD_DSR_CTS;
	default:
		return uart->regs[reg];
	}
}

static int is_console(const struct kvm_run *run, const struct kl_uart *uart)
{
	return run->exit_reason == KVM_EXIT_IO && run->io.size == 1 &&
	       run->io.port >= uart->base && run->io.port < uart->base + 8;
}

int kl_console(struct kvm_run *run, struct kl_uart *uart)
{
	uint8_t *data = (uint8_t *)run + run->io.data_offset;
	int line = 0;

	if (!is_console(run, uart))
		return -1;
	for (uint32_t i = 0; i < run->io.count; i++) {
		if (run->io.direction == KVM_EXIT_IO_OUT) {
			kl_uart_out(uart, run->io.port, data[i]);
			line |= data[i] == '\n';
		} else {
			data[i] = kl_uart_in(uart, run->io.port);
		}
	}
	return uart->used && (line || uart->used > sizeof(uart->text) - MAX_STRING);
}

struct kl_exit kl_run(int fd, struct kvm_run *run, struct kl_uart *uart)
{
	struct kl_exit out = { 0 };

	for (;;) {
		int shown;

		out.ret = ioctl(fd, KVM_RUN, 0);
		out.runs++;
		if (out.ret == -1) {
			out.err = errno;
			return out;
		}
		shown = uart ? kl_console(run, uart) : -1;
		if (shown) {
			out.handled = shown == 1;
			return out;
		}
	}
}
