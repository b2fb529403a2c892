/* store/job.h -- what store/job.c and store/decode.c share of a job that was dispatched. */
#ifndef VND_JOB_H
#define VND_JOB_H
#include "store/fetcher.h"

/* The job of an id, locked; NULL: no such job. */
struct job *job_get(struct vnd_engine *e, uint64_t id);
const struct blobtable *job_table(const struct job *j);
/* Whether no reader wants the rest of the job. */
bool job_unwanted(struct fetcher *f, struct job *j);
/* The chunk's bytes are not the image's. False where that says nothing of them: the cache's files were exchanged since the
 * chunk map said that the chunk is there, so that a VERIFY job read another file than the map was of. The chunk is then
 * looked at again. */
bool job_chunk_is_bad(struct job *j, uint32_t rel);

#endif
