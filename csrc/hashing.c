/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Hashing of measured pages.
 *
 * CONTENTS is the SHA-384 of a page, and pages have nothing to do with each other: several are
 * hashed side by side in vector registers, and blocks of pages by several threads. The launch
 * digest is a chain of SHA-384 over PAGE_INFO, page by page: the calling thread adds a block of
 * pages as soon as their contents are known, and hashes contents like the others until then.
 *
 * With AVX2 a round takes about 54 vector operations, of which Intel's cores do three a cycle:
 * that is the limit, and 1.65 times as fast as OpenSSL's scalar code. AVX-512 has one operation
 * for a rotation where AVX2 needs three, and eight lanes.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "hashing.h"
#include "sha384.h"

/* KL_HASH_PORTABLE leaves out what other machines haven't got. */
#if defined(__x86_64__) && !defined(KL_HASH_PORTABLE)
#define WITH_X86
#endif

#define BLOCK_PAGES 32
#define MAX_BLOCKS (KL_HASH_MAX_PAGES / BLOCK_PAGES)
#define MAX_THREADS 64
#define MAX_LANES 8
#define RECORD_BYTES (2 * DIGEST_BYTES)
#define PAGE_INFO_BYTES 112

/* The launch digest as words. */
static inline void load_digest(uint64_t words[DIGEST_WORDS], const uint8_t *digest)
{
	for (int i = 0; i < DIGEST_WORDS; i++)
		words[i] = load_be64(digest + 8 * i);
}

static inline void store_digest(uint8_t *digest, const uint64_t words[DIGEST_WORDS])
{
	for (int i = 0; i < DIGEST_WORDS; i++)
		store_be64(digest + 8 * i, words[i]);
}

typedef void hash_pages_fn(const uint8_t *const pages[], uint8_t *const out[],
			   const uint64_t padding[80]);
typedef void chain_fn(uint64_t digest[DIGEST_WORDS], uint64_t info, uint64_t gpa,
		      const uint8_t *contents, size_t npages, size_t step, uint8_t *records);

#define LOAD(pages, lane, at) load_be64((pages)[lane] + (at))

#define NAME(x) x##_portable
#define TARGET
#define WORD uint64_t
#define LANES 1
#define GATHER(pages, at) LOAD(pages, 0, at)
#define WITH_CHAIN
#include "sha384_block.h"

#ifdef WITH_X86
typedef uint64_t four_words __attribute__((vector_size(32)));
typedef uint64_t eight_words __attribute__((vector_size(64)));

#define NAME(x) x##_bmi2
#define TARGET __attribute__((target("bmi,bmi2")))
#define WORD uint64_t
#define LANES 1
#define GATHER(pages, at) LOAD(pages, 0, at)
#define WITH_CHAIN
#include "sha384_block.h"

#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2")))
#define WORD four_words
#define LANES 4
#define GATHER(pages, at) ((WORD){ LOAD(pages, 0, at), LOAD(pages, 1, at), \
				   LOAD(pages, 2, at), LOAD(pages, 3, at) })
#include "sha384_block.h"

#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f")))
#define WORD eight_words
#define LANES 8
#define GATHER(pages, at) ((WORD){ LOAD(pages, 0, at), LOAD(pages, 1, at), \
				   LOAD(pages, 2, at), LOAD(pages, 3, at), \
				   LOAD(pages, 4, at), LOAD(pages, 5, at), \
				   LOAD(pages, 6, at), LOAD(pages, 7, at) })
#include "sha384_block.h"
#endif

struct backend {
	const char *name;
	size_t lanes;
	hash_pages_fn *side_by_side;
	hash_pages_fn *one;
	chain_fn *chain;
};

static const struct backend backends[] = {
#ifdef WITH_X86
	{ "avx512", 8, hash_pages_avx512, hash_pages_bmi2, chain_bmi2 },
	{ "avx2", 4, hash_pages_avx2, hash_pages_bmi2, chain_bmi2 },
#endif
	{ "portable", 1, hash_pages_portable, hash_pages_portable, chain_portable },
};

#define BACKENDS (int)(sizeof(backends) / sizeof(*backends))

/* The first of them that works here. */
static int first_backend(void)
{
#ifdef WITH_X86
	bool bmi = __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");

	if (bmi && __builtin_cpu_supports("avx512f"))
		return 0;
	if (bmi && __builtin_cpu_supports("avx2"))
		return 1;
#endif
	return BACKENDS - 1;
}

const char *kl_hash_backend(int index)
{
	index += first_backend();
	return index < BACKENDS ? backends[index].name : NULL;
}

static const struct backend *chosen(int index)
{
	return &backends[first_backend() + index];
}

/*
 * Pages of one byte (firmware is padded with 0xFF, memory with 0): their contents, once known.
 * `state` goes from 0 to 1 by who fills the entry in, and then to 2.
 */
static struct {
	atomic_int state;
	uint8_t contents[DIGEST_BYTES];
} uniform[256];

static void hash_uniform(const struct backend *backend, const uint8_t *page, uint8_t *out,
			 const uint64_t padding[80])
{
	int unknown = 0;

	if (atomic_load_explicit(&uniform[*page].state, memory_order_acquire) == 2) {
		memcpy(out, uniform[*page].contents, DIGEST_BYTES);
		return;
	}
	backend->one(&page, &out, padding);
	if (atomic_compare_exchange_strong(&uniform[*page].state, &unknown, 1)) {
		memcpy(uniform[*page].contents, out, DIGEST_BYTES);
		atomic_store_explicit(&uniform[*page].state, 2, memory_order_release);
	}
}

static void hash_contents(const struct backend *backend, const uint8_t *data, size_t npages,
			  uint8_t *contents, size_t step, const uint64_t padding[80])
{
	const uint8_t *pages[MAX_LANES];
	uint8_t *out[MAX_LANES], unwanted[DIGEST_BYTES];
	size_t waiting = 0;

	for (; npages; npages--, data += PAGE_BYTES, contents += step) {
		if (!memcmp(data, data + 1, PAGE_BYTES - 1)) {
			hash_uniform(backend, data, contents, padding);
			continue;
		}
		pages[waiting] = data;
		out[waiting++] = contents;
		if (waiting == backend->lanes) {
			backend->side_by_side(pages, out, padding);
			waiting = 0;
		}
	}
	/* A round of all lanes takes as long as two or three pages one by one. */
	if (waiting > 2) {
		for (size_t lane = waiting; lane < backend->lanes; lane++) {
			pages[lane] = pages[0];
			out[lane] = unwanted;
		}
		backend->side_by_side(pages, out, padding);
		return;
	}
	for (size_t i = 0; i < waiting; i++)
		backend->one(&pages[i], &out[i], padding);
}

/* Blocks of pages, taken by whoever is free. */
struct job {
	const struct backend *backend;
	const uint8_t *data;
	size_t npages;
	uint8_t *contents;
	size_t step;
	uint64_t padding[80];
	pthread_mutex_t lock;
	pthread_cond_t hashed;
	size_t next;
	bool done[MAX_BLOCKS];
};

static size_t blocks(const struct job *job)
{
	return (job->npages + BLOCK_PAGES - 1) / BLOCK_PAGES;
}

static size_t block_pages(const struct job *job, size_t block)
{
	size_t left = job->npages - block * BLOCK_PAGES;

	return left < BLOCK_PAGES ? left : BLOCK_PAGES;
}

/* Hashes the next block, if there is one. The lock is held before and after. */
static bool hash_next(struct job *job)
{
	size_t block = job->next, first = block * BLOCK_PAGES;

	if (block == blocks(job))
		return false;
	job->next++;
	pthread_mutex_unlock(&job->lock);
	hash_contents(job->backend, job->data + first * PAGE_BYTES, block_pages(job, block),
		      job->contents + first * job->step, job->step, job->padding);
	pthread_mutex_lock(&job->lock);
	job->done[block] = true;
	pthread_cond_signal(&job->hashed);
	return true;
}

static void *work(void *argument)
{
	struct job *job = argument;

	pthread_mutex_lock(&job->lock);
	while (hash_next(job))
		;
	pthread_mutex_unlock(&job->lock);
	return NULL;
}

/* Returns when the contents of a block are there. */
static void wait_for(struct job *job, size_t block)
{
	pthread_mutex_lock(&job->lock);
	while (!job->done[block])
		if (!hash_next(job))
			pthread_cond_wait(&job->hashed, &job->lock);
	pthread_mutex_unlock(&job->lock);
}

static void start_job(struct job *job)
{
	schedule_padding(job->padding, UINT64_C(1) << 63, PAGE_BYTES);
	pthread_mutex_init(&job->lock, NULL);
	pthread_cond_init(&job->hashed, NULL);
}

static size_t start_workers(struct job *job, pthread_t *workers, unsigned int threads)
{
	size_t count, wanted = threads < MAX_THREADS ? threads : MAX_THREADS;

	if (wanted > blocks(job))
		wanted = blocks(job);
	/* Where no thread can be had, the caller does the work. */
	for (count = 0; count + 1 < wanted; count++)
		if (pthread_create(&workers[count], NULL, work, job))
			break;
	return count;
}

static void end_job(struct job *job, const pthread_t *workers, size_t count)
{
	while (count)
		pthread_join(workers[--count], NULL);
	pthread_cond_destroy(&job->hashed);
	pthread_mutex_destroy(&job->lock);
}

void kl_hash_contents(int backend, const uint8_t *data, size_t npages, uint8_t *contents,
		      unsigned int threads)
{
	struct job job = {
		.backend = chosen(backend),
		.data = data,
		.npages = npages,
		.contents = contents,
		.step = DIGEST_BYTES,
	};
	pthread_t workers[MAX_THREADS];
	size_t count;

	start_job(&job);
	count = start_workers(&job, workers, threads);
	work(&job);
	end_job(&job, workers, count);
}

void kl_hash_chain(int backend, uint8_t *digest, const uint8_t *info, uint64_t gpa,
		   const uint8_t *contents, size_t npages, size_t step, uint8_t *records)
{
	uint64_t words[DIGEST_WORDS];

	load_digest(words, digest);
	chosen(backend)->chain(words, load_be64(info), gpa, contents, npages, step, records);
	store_digest(digest, words);
}

void kl_hash_pages(int backend, uint8_t *digest, const uint8_t *info, uint64_t gpa,
		   const uint8_t *data, size_t npages, uint8_t *records, unsigned int threads)
{
	struct job job = {
		.backend = chosen(backend),
		.data = data,
		.npages = npages,
		.contents = records,
		.step = RECORD_BYTES,
	};
	uint64_t words[DIGEST_WORDS];
	pthread_t workers[MAX_THREADS];
	size_t count;

	start_job(&job);
	count = start_workers(&job, workers, threads);
	load_digest(words, digest);
	for (size_t block = 0; block < blocks(&job); block++) {
		size_t first = block * BLOCK_PAGES;
		uint8_t *at = records + first * RECORD_BYTES;

		wait_for(&job, block);
		job.backend->chain(words, load_be64(info), gpa + first * PAGE_BYTES, at,
				   block_pages(&job, block), RECORD_BYTES, at);
	}
	store_digest(digest, words);
	end_job(&job, workers, count);
}
