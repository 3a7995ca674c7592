/*
 * Callbacks for kvmlaunch.softcpu's engine, in C because they run once per block of guest code.
 * They have the signatures of unicorn.h's uc_cb_hookcode_t, uc_cb_hookintr_t and
 * uc_cb_insn_syscall_t, but need nothing of unicorn: what stops it is a pointer in the run's state.
 */
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <stdint.h>

struct run_state {
	int64_t ticks_left;
	int64_t event;
	void (*stop)(void *engine);
	uint64_t first_block;
	uint64_t blocks;
};

#define EVENT_BUDGET -1
#define EVENT_SYSCALL -4
#define EVENT_SYSENTER -5

static void stop(void *engine, struct run_state *run, int64_t event)
{
	run->event = event;
	run->stop(engine);
}

static void on_block(void *engine, uint64_t address, uint32_t size, void *state)
{
	struct run_state *run = state;

	if (run->ticks_left > 0) {
		run->ticks_left -= size;
		if (!run->blocks++)
			run->first_block = address;
	} else if (run->blocks == 1 && address == run->first_block) {
		/* Where its first instruction changes the block, it begins anew before that is done. */
		run->blocks++;
	} else {
		stop(engine, run, EVENT_BUDGET);
	}
}

static void on_interrupt(void *engine, uint32_t number, void *state)
{
	stop(engine, state, number);
}

static void on_syscall(void *engine, void *state)
{
	stop(engine, state, EVENT_SYSCALL);
}

static void on_sysenter(void *engine, void *state)
{
	stop(engine, state, EVENT_SYSENTER);
}

static int add_address(PyObject *module, const char *name, void *function)
{
	PyObject *value = PyLong_FromVoidPtr(function);
	int failed = PyModule_AddObjectRef(module, name, value);

	Py_XDECREF(value);
	return failed;
}

static int fill_module(PyObject *module)
{
	return add_address(module, "BLOCK", (void *)on_block) ||
	       add_address(module, "INTERRUPT", (void *)on_interrupt) ||
	       add_address(module, "SYSCALL", (void *)on_syscall) ||
	       add_address(module, "SYSENTER", (void *)on_sysenter) ? -1 : 0;
}

static PyModuleDef_Slot slots[] = {
	{ Py_mod_exec, fill_module },
	{ 0, NULL },
};

static struct PyModuleDef definition = {
	PyModuleDef_HEAD_INIT,
	.m_name = "_hooks",
	.m_doc = "Addresses of C callbacks for the engine.",
	.m_slots = slots,
};

PyMODINIT_FUNC PyInit__hooks(void)
{
	return PyModuleDef_Init(&definition);
}
